"""A plan of the densities that a compile without one would measure on its first batch, within `max_rise` of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from sptc.config import Config
from sptc.ir.plan import Choice, Plan, PlannedRegion
from sptc.ir.region import Cost, LossRegion, Region
from sptc.passes.decide.decisions import at_density, pays
from sptc.passes.decide.planned import region_facts, region_keys
from sptc.passes.decide.remainder import remainder_seconds
from sptc.passes.decide.settings import splits
from sptc.passes.unit import Unit
from sptc.plans.rise import Rises, weigh_and_tell
from sptc.plans.sensitivity import SensitivityError, analysed, kept_by_losses


class Rising:
    """Runs of the example batch for `sptc.model.capture`: `on_graph`; then `plan` has what was chosen.

    The model runs once, as it is; what is measured is measured within a graph, by the runs that `weigh` has. A graph whose predictions
    are computed elsewhere keeps all.
    """

    def __init__(self, config: Config, max_rise: float) -> None:
        options = {**config.to_options(), "max_rise": max_rise, "attention.density": "auto", "ffn.density": "auto"}
        self._config, self._max_rise = Config.from_options(options), max_rise
        self._regions: dict[str, PlannedRegion] = {}
        self._other_seconds = 0.0
        self._losses_kept = 0.0
        self._loss: float | None = None
        self._graphs = 0
        self._whys: set[str] = set()

    def on_graph(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        unit = analysed(gm, inputs, self._config)
        weighed, rises = weigh_and_tell(unit)
        if rises.loss is not None:
            self._loss = rises.loss
        graph, self._graphs = self._graphs, self._graphs + 1
        regions = dict(_planned(weighed, rises, graph))
        self._whys.update(d.reason for d in weighed.decisions if "can't be measured" in d.reason)
        other = remainder_seconds(unit)
        losses = kept_by_losses(unit)

        def call(*args: Any) -> Any:
            self._other_seconds += other
            self._losses_kept += losses
            for key, region in regions.items():
                self._regions[key] = _once_more(self._regions.get(key), region)
            return gm.forward(*args)

        return call

    def plan(self, options: Mapping[str, Any]) -> Plan:
        """What was chosen.

        Raises:
            SensitivityError: no density could be measured.
        """
        if self._loss is None and self._max_rise > 0 and self._whys:
            raise SensitivityError(f"nothing can be planned by what the loss rises by: {min(self._whys)}")
        return Plan(
            {"max_rise": float(self._max_rise)},
            options,
            self._other_seconds,
            tuple(self._regions.values()),
            self._losses_kept,
            self._loss,
        )


def _planned(unit: Unit, rises: Rises, graph: int) -> Iterator[tuple[str, PlannedRegion]]:
    """The regions of a graph by key, at the densities that were chosen."""
    sparse = {d.region for d in unit.decisions if d.rewrite and not isinstance(d.region, LossRegion)}
    for region, key in region_keys(unit.regions).items():
        choices = tuple(_choice(unit, region, density, rise) for density, rise in {1.0: 0.0, **rises.of.get(region, {})}.items())
        facts, apart = region_facts(unit, region), splits(unit, region)
        yield key, PlannedRegion(key, (graph,), facts, rises.chosen.get(region, 1.0) if region in sparse else 1.0, choices, apart=apart)


def _choice(unit: Unit, region: Region, density: float, rise: float) -> Choice:
    settings, dense, sparse = at_density(unit, region, density)
    cost: Cost = sparse if density < 1.0 or pays(unit, region, settings, dense, sparse) else dense
    return Choice(density, cost.seconds, math.sqrt(rise), cost.kept)


def _once_more(before: PlannedRegion | None, region: PlannedRegion) -> PlannedRegion:
    """A region that one call more of a graph runs, or another graph: its seconds and bytes add up.

    It keeps as much as the graph that needs most of it: all where one could not be measured, or was of other tokens.
    """
    if before is None:
        return region
    known = {choice.density: choice for choice in before.choices if choice.density == 1.0 or before.apart == region.apart}
    choices = tuple(
        replace(
            c, seconds=c.seconds + known[c.density].seconds, kept=c.kept + known[c.density].kept, error=max(c.error, known[c.density].error)
        )
        for c in region.choices
        if c.density in known
    )
    density = min(c.density for c in choices if c.density >= max(before.density, region.density))
    return replace(region, graphs=tuple(sorted({*before.graphs, *region.graphs})), density=density, choices=choices)
