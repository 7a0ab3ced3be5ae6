"""How a region would be rewritten: its settings at a density, from options, prepared state and sizes, and which densities are tried."""

from __future__ import annotations

import torch

from sptc.ir.hint import optimization_hint
from sptc.ir.region import (
    AttentionRegion,
    AttentionSettings,
    CodebookState,
    Counted,
    FfnRegion,
    FfnSettings,
    Region,
    RouterState,
    State,
    UnitSettings,
)
from sptc.ir.sample import RANK
from sptc.passes.decide.chunk import chunk_of
from sptc.passes.decide.constraints import guardable, lower_bound
from sptc.passes.decide.cost import share
from sptc.passes.find.counted import fits
from sptc.passes.find.padding import may_average
from sptc.passes.graph.pattern import shape
from sptc.passes.unit import Unit

_ROUTED_DENSITY, _PQ_DENSITY = 1 / 2, 1 / 8  # the paper's, of "auto"
_TRIED_KEYS = (1 / 4, 1 / 8)
_TRIED_UNITS = {True: (1 / 2, 1 / 8), False: (3 / 4, 1 / 2)}  # of tokens that do not count in the loss, and of all
_MOST = 0.9  # of the tokens of the example batch that may count, if the others are to be told apart


def routes(unit: Unit, region: FfnRegion) -> bool:
    """Whether an FFN becomes blocks for each token, as the paper has it, and not single units for many tokens."""
    return region in unit.states or unit.config.ffn_selector == "router"


def enabled(unit: Unit, region: Region) -> bool:
    """Whether the options let regions of this kind be rewritten."""
    return unit.config.ffn_enabled if region.kind == "ffn" else unit.config.attention_enabled


def blocks_of(unit: Unit, state: State | None) -> int:
    return int(shape(state.weight)[0]) if isinstance(state, RouterState) else unit.config.ffn_blocks


def routed_settings(unit: Unit, region: FfnRegion, state: State | None, density: float) -> FfnSettings:
    blocks, kept = blocks_of(unit, state), share(density)
    active = -(-kept.numerator * blocks // kept.denominator)
    keep = unit.config.ffn_keep == "loss" and 1 < active < blocks and isinstance(unit.counted, Counted) and fits(unit.counted.lead, region)
    return FfnSettings(blocks, active, keep)


def uniform_density(unit: Unit, region: Region) -> float:
    """The density that the options give to a region: of the tokens that do not count, where these keep other units than the rest."""
    if isinstance(region, AttentionRegion):
        given = unit.config.attention_density
        if given == "auto":
            return _PQ_DENSITY if _by_codes(unit, region) else min(_TRIED_KEYS)
        return given
    if routes(unit, region):
        return _ROUTED_DENSITY if unit.config.ffn_density == "auto" else unit.config.ffn_density
    of_units = unit.config.context_density if splits(unit, region) else unit.config.ffn_density
    assert of_units is not None
    return min(tried(unit, region)) if of_units == "auto" else of_units


def tried(unit: Unit, region: Region) -> tuple[float, ...]:
    """The densities that are measured: of keys, or of hidden units."""
    if not isinstance(region, AttentionRegion):
        return _TRIED_UNITS[splits(unit, region)]
    state = unit.states.get(region)
    fit = tuple(d for d in _TRIED_KEYS if not unfit(unit, region, attention_settings(unit, region, state, d)))
    return fit or _TRIED_KEYS[-1:]


def _by_codes(unit: Unit, region: AttentionRegion) -> bool:
    """Whether keys are chosen by codebooks, as the paper has it, or are to be once there are some."""
    return region in unit.states or unit.config.attention_selector == "pq"


def measured(unit: Unit, region: Region) -> bool:
    """Whether the density of a region is to be measured on the example batch, not given."""
    if unit.plan is not None:
        return False
    if isinstance(region, AttentionRegion):
        return unit.config.attention_density == "auto" and not _by_codes(unit, region)
    if routes(unit, region):
        return False
    if splits(unit, region) and unit.read.get(region) == "counted":
        return False  # there is no context
    return (unit.config.context_density if splits(unit, region) else unit.config.ffn_density) == "auto"


def splits(unit: Unit, region: Region) -> bool:
    """Whether tokens that count in the loss keep other units than those that do not: not where next to all of them count."""
    return isinstance(region, FfnRegion) and unit.config.context_density is not None and told_apart(unit, region)


def told_apart(unit: Unit, region: FfnRegion) -> bool:
    if not isinstance(unit.counted, Counted) or not fits(unit.counted.lead, region):
        return False
    return unit.counted_share is None or unit.counted_share <= _MOST


def unit_settings(unit: Unit, region: FfnRegion, density: float) -> UnitSettings:
    rows, again = unit.read.get(region, "all"), computed_again(unit, region)
    chunk = chunk_of(unit, region) if again else None
    units, context = units_of(region, density), None
    if splits(unit, region):
        counted = unit.config.ffn_density
        context = None if rows == "counted" else units
        units = units_of(region, 1.0 if counted == "auto" else counted)
    left_out = min(units, region.hidden if context is None else context) < region.hidden
    rank = rank_of(region) if left_out and unit.config.ffn_left_out == "linear" else 0
    return UnitSettings(region.hidden, units, context, rows=rows, recompute=again, chunk=chunk, rank=rank)


def rank_of(region: FfnRegion) -> int:
    """The rank of the linear map that stands in for hidden units that are left out."""
    return min(RANK, *(-(-int(shape(node)[-1]) // 4) for node in (region.x, region.y)))


def computed_again(unit: Unit, region: FfnRegion) -> bool:
    """Whether backward computes its hidden values again."""
    return unit.config.recomputes or region in unit.lean


def units_of(region: FfnRegion, density: float) -> int:
    kept = share(density)
    return -(-kept.numerator * region.hidden // kept.denominator)


def attention_settings(unit: Unit, region: AttentionRegion, state: State | None, density: float) -> AttentionSettings:
    """Codebooks select by pq; without them only pooled queries are possible."""
    config = unit.config
    n, m = optimization_hint(shape(region.q)[-2]), optimization_hint(shape(region.k)[-2])
    query_block, key_block = unit.device.default_blocks(n, m, density, region.mask.causal)
    return AttentionSettings(
        density,
        config.attention_query_block or query_block,
        config.attention_key_block or key_block,
        "pq" if isinstance(state, CodebookState) else "pooled",
    )


def unfit(unit: Unit, region: AttentionRegion, settings: AttentionSettings) -> str:
    """Why attention can't become sparse by these settings, whatever is gained; "" if it can."""
    if settings.density == 1.0 and may_average(region) and unit.config.decline != "never":
        return (
            "at density 1 it must equal dense attention, which averages over all keys for a query whose every key is hidden by a finite "
            "number, as its mask might hide them; a boolean mask for scaled_dot_product_attention has zeros there"
        )
    for size, least in ((shape(region.q)[-2], settings.query_block), (shape(region.k)[-2], settings.key_block / settings.density)):
        # Torch guards on sizes of 1, as of a single tile, which would break the promise of mark_dynamic.
        if isinstance(size, torch.SymInt) and not guardable(size, unit.gm, unit.example_inputs) and lower_bound(size) <= least:
            return f"mark_dynamic was given lengths from {lower_bound(size)} on; one compile for all of them needs more than {least:.0f}"
    return ""
