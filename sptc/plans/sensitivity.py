"""How much each region's sparsity changes a model, measured on an example batch: one region sparse, everything else dense.

The sparse forms of all regions at all densities are inserted beside the dense ones into the normalized graphs, once. Then the batch runs
again and again; each time an interpreter takes one region's sparse form for its dense one and leaves out all other sparse forms. So
whole models are measured, graph breaks and checkpoint bodies included, by the operators that a compile would run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from sptc.backend import captured_unit
from sptc.config import Config
from sptc.ir.errors import SptcError
from sptc.ir.plan import DENSITIES
from sptc.ir.region import Cost, LossRegion, Region, Settings, UnitSettings
from sptc.passes import ANALYSIS
from sptc.passes.decide.decisions import at_density, lean_form, pays
from sptc.passes.decide.planned import region_facts, region_keys
from sptc.passes.decide.remainder import remainder_seconds
from sptc.passes.decide.settings import enabled, splits
from sptc.passes.graph.pattern import requires_grad, shape, value
from sptc.passes.runner import run
from sptc.passes.unit import Unit
from sptc.plans.beside import Mixed, insert_beside


class SensitivityError(SptcError, ValueError):
    """The model can't be measured: why, and what to do."""


Form = tuple[float, bool]
DENSE, LEAN = (1.0, False), (1.0, True)


@dataclass
class Measured:
    """One region: what it costs in a step by density, and how much the model changes with it alone at that density.

    A form is a density, 1 for dense, and whether it is exact and keeps less.
    """

    facts: Mapping[str, int]
    apart: bool
    graphs: set[int] = field(default_factory=set)
    seconds: dict[Form, float] = field(default_factory=dict)
    kept: dict[Form, float] = field(default_factory=dict)
    errors: dict[float, float] = field(default_factory=dict)


class Sensitivity:
    """Runs of the example batch for `sptc.model.capture`: `on_graph` and `again`. Results are in `regions` by key.

    The first run is dense. Dropout is left out of all of them, so that two runs differ by sparsity alone. Only densities at which a region
    gets faster than at all greater ones are tried. Nothing needs a gradient.
    """

    def __init__(self, config: Config, progress: Callable[[int, int], None] | None = None) -> None:
        self.regions: dict[str, Measured] = {}
        self.other_seconds = 0.0
        self.losses_kept = 0.0
        self._config = config
        self._progress = progress or (lambda done, of: None)
        self._graphs = 0
        self._densities: Mapping[str, float] = {}
        self._variants: list[tuple[str, float]] = []
        self._dense: list[Tensor] | None = None
        self._before_loss: list[Tensor] = []  # of the run at hand

    def on_graph(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        unit = analysed(gm, inputs, self._config)
        beside, ends = insert_beside(unit, {r: tuple(_candidates(unit, r)) for r in unit.regions}), _before_scalars(unit)
        costs = _costs(unit, self._graphs, self.regions)
        other, self._graphs = remainder_seconds(unit), self._graphs + 1
        losses = kept_by_losses(unit)

        def call(*args: Any) -> Any:
            if self._dense is None:
                self._count(costs, other, losses)
            with torch.no_grad():
                mixed = Mixed(unit.gm, beside, self._densities, ends)
                output = mixed.run(*args)
                self._before_loss += mixed.seen.values()
                return output

        return call

    def _count(self, costs: Mapping[str, Mapping[Form, Cost]], other: float, losses: float) -> None:
        """One more call of a graph in a step."""
        self.other_seconds += other
        self.losses_kept += losses
        for key, by_form in costs.items():
            seconds, kept = self.regions[key].seconds, self.regions[key].kept
            for form, cost in by_form.items():
                seconds[form] = seconds.get(form, 0.0) + cost.seconds
                kept[form] = kept.get(form, 0.0) + cost.kept

    def again(self, output: Any) -> bool:
        """Take note of a run's output; whether there is something left to try."""
        values, self._before_loss = _values(output, self._before_loss), []
        if self._dense is None:
            if not all(bool(t.isfinite().all()) for t in values):
                raise SensitivityError("what the model returns on the example batch is not finite, so its change can't be measured")
            self._dense = values
            self._variants = [(key, density) for key, m in self.regions.items() for density in _faster(m.seconds)]
        else:
            ((key, density),) = self._densities.items()
            self.regions[key].errors[density] = relative_error(values, self._dense)
        tried = sum(len(m.errors) for m in self.regions.values())
        self._progress(tried, len(self._variants))
        self._densities = dict(self._variants[tried : tried + 1])
        return bool(self._densities)


def analysed(gm: fx.GraphModule, inputs: Sequence[Any], config: Config) -> Unit:
    """A captured graph with its regions found and decided.

    Raises:
        SensitivityError: no pass can look into it.
    """
    unit = run(captured_unit(gm, inputs, config), ANALYSIS)
    if unit.closed is not None:
        raise SensitivityError(f"{unit.closed.reason}; the time of its graph can't be predicted, so no plan can be made")
    return unit


def kept_by_losses(unit: Unit) -> float:
    """Bytes that losses keep for backward, predicted, in the form that was decided."""
    return math.fsum((d.sparse if d.rewrite else d.dense).kept for d in unit.decisions if isinstance(d.region, LossRegion))


def _faster(seconds: Mapping[Form, float]) -> Iterator[float]:
    """The densities that save time, densest first; in a short sequence two may keep the same blocks."""
    least = seconds[DENSE]
    for density, lean in sorted(seconds, reverse=True):
        if not lean and seconds[density, lean] < least:
            least = seconds[density, lean]
            yield density


def relative_error(values: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """|values - dense| / |dense|, all tensors as one vector."""
    pairs = list(zip(values, dense, strict=True))
    change = math.fsum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = math.fsum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(change / size) if size else math.inf if change else 0.0


def _values(output: Any, before_loss: list[Tensor]) -> list[Tensor]:
    """The floating tensors that a model returns, its logits for example; if there is only a loss, what the loss is computed from.

    A loss itself tells too little: on a few examples its changes are as often down as up, and a search among them finds the accidents.
    """
    floating = [t.detach() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not floating:
        raise SensitivityError("the model returns no floating tensor whose change could be measured; return the loss or the logits")
    return [t for t in floating if t.dim()] or before_loss or floating


def _before_scalars(unit: Unit) -> frozenset[Node]:
    """The last floating tensors before they become the scalars that a graph returns; those with a gradient, if any has one."""
    (output,) = unit.gm.graph.find_nodes(op="output")
    found: set[Node] = set()
    waiting = [node for node in output.all_input_nodes if shape(node) == () and isinstance(value(node), Tensor)]
    seen = set(waiting)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node in seen or not isinstance(value(node), Tensor):
                continue
            seen.add(node)
            if shape(node) == ():
                waiting.append(node)
            elif value(node).is_floating_point():
                found.add(node)
    return frozenset(node for node in found if requires_grad(node)) or frozenset(found)


def _costs(unit: Unit, graph: int, measured: dict[str, Measured]) -> dict[str, dict[Form, Cost]]:
    """What each region of a graph costs by its form, dense first; the regions get an entry in `measured`."""
    costs: dict[str, dict[Form, Cost]] = {}
    for region, key in region_keys(unit.regions).items():
        measured.setdefault(key, Measured(region_facts(unit, region), splits(unit, region))).graphs.add(graph)
        settings, dense, exact = at_density(unit, region, 1.0)
        lean = lean_form(unit, region)
        asked = settings.recompute if isinstance(settings, UnitSettings) else unit.config.objective == "memory"
        if lean is not None and asked and pays(unit, region, settings, dense, exact):  # the options have it so, whatever the plan
            dense, lean = exact, None
        costs[key] = {DENSE: dense} if lean is None else {DENSE: dense, LEAN: lean[2]}
        costs[key] |= {(s.density, False): at_density(unit, region, s.density)[2] for s in _candidates(unit, region)}
    return costs


def _candidates(unit: Unit, region: Region) -> Iterator[Settings]:
    """The sparse forms to try, densest first."""
    if not enabled(unit, region):
        return
    tried = (at_density(unit, region, density)[0] for density in DENSITIES[region.kind])
    # For all tokens: what padding is left with would be counted as an error of what the model returns.
    by_density = {s.density: replace(s, rows="all") if isinstance(s, UnitSettings) else s for s in tried}
    yield from (settings for density, settings in by_density.items() if density < 1.0)
