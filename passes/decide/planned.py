"""Names of regions that hold in every process, a plan's densities for the regions of a graph, and why a plan does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from sptc.config import ConfigError
from sptc.ir.plan import PlannedRegion
from sptc.ir.region import FfnRegion, Region, RouterState
from sptc.passes.graph.pattern import shape
from sptc.passes.unit import Unit


def region_keys(regions: Sequence[Region]) -> dict[Region, str]:
    """The key of each region of one graph: module path, kind, and which of its kind it is in that module, such as "layers.0.mlp:ffn0".

    `regions` are in the order in which the graph computes them.
    """
    seen: Counter[tuple[str, str]] = Counter()
    keys = {}
    for region in regions:
        place = (region.site.module, region.kind)
        keys[region] = f"{region.site.module}:{region.kind}{seen[place]}"
        seen[place] += 1
    return keys


def region_facts(unit: Unit, region: Region) -> dict[str, int]:
    """What a region must have in common with that of a plan: no lengths, which may differ from batch to batch."""
    if isinstance(region, FfnRegion):
        state = unit.states.get(region)
        if state is None and unit.config.ffn_selector != "router":
            return {"hidden": region.hidden}
        blocks = int(shape(state.weight)[0]) if isinstance(state, RouterState) else unit.config.ffn_blocks
        return {"blocks": blocks, "hidden": region.hidden}
    heads, key_heads, size = (int(s) for s in (shape(region.q)[-3], shape(region.k)[-3], shape(region.q)[-1]))
    return {"heads": heads, "key_heads": key_heads, "head_size": size}


def planned_regions(unit: Unit) -> Mapping[Region, PlannedRegion]:
    """What the unit's plan has of each region; {} without a plan, and for a graph without regions.

    Raises:
        ConfigError: the regions of the graph are not those of any graph that was planned, or one has other sizes.
    """
    if unit.plan is None or not unit.regions:
        return {}
    keys = region_keys(unit.regions)
    planned = {region.key: region for region in unit.plan.regions}
    if unknown := [key for key in keys.values() if key not in planned]:
        raise ConfigError(f"the plan does not fit the model: it has no region {_names(unknown)}; {_AGAIN}")
    refused = {(refusal.site.module, refusal.kind) for refusal in unit.refusals}

    def lacking(group: Set[str]) -> list[str]:
        """Keys of a planned graph that this one neither has nor refuses, as it may with other inputs."""
        return sorted(key for key in group - set(keys.values()) if _place(key) not in refused)

    groups = [group for group in unit.plan.graphs() if group.issuperset(keys.values())]
    if not groups:
        raise ConfigError(
            f"the plan does not fit the model: {_names(list(keys.values()))} are in one graph, but not so in the plan; {_AGAIN}"
        )
    if missing := min(map(lacking, groups), key=len):
        raise ConfigError(f"the plan does not fit the model, which has no region {_names(missing)}; {_AGAIN}")
    for region, key in keys.items():
        wanted = planned[key].facts
        for name, size in region_facts(unit, region).items():
            if wanted.get(name) != size:
                raise ConfigError(f"the plan does not fit the model: {name} of {key} is {size}, in the plan {wanted.get(name)}; {_AGAIN}")
    return {region: planned[key] for region, key in keys.items()}


def planned_lean(unit: Unit) -> frozenset[Region]:
    """The regions that the unit's plan, which fits, wants to keep less for backward."""
    if unit.plan is None:
        return frozenset()
    lean = {region.key for region in unit.plan.regions if region.lean}
    return frozenset(region for region, key in region_keys(unit.regions).items() if key in lean)


_AGAIN = "make a plan for this model with sptc.plan"


def _place(key: str) -> tuple[str, str]:
    """Module and kind of a key."""
    module, _, slot = key.rpartition(":")
    return module, slot.rstrip("0123456789")


def _names(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
