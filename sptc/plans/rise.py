"""Densities by what they cost the model: measured region by region on the first batch, within `max_rise`.

How much attention or an FFN may leave out differs from model to model and from layer to layer, so it is never assumed. The batch runs once
dense, then once for each region and density with this one sparse, without gradients and without dropout, before the graph is compiled.
What comes before the region is shared with the dense run, and of the logits only the rows that are compared are computed. On a CPU
attention that keeps all is computed by the sparse kernel at density 1, which is exact and several times faster. Behind a density
that alone takes more than half of `max_rise` no sparser one is tried, whose rise is taken to be twice as much. In deep models neighbours
are measured together: about a dozen groups of each kind bound the runs. A run's rise is the divergence of its predictions from the dense
ones, KL(dense || sparse), at the tokens that count in the loss: what the loss of labels drawn from the dense model would rise by, without
the noise of the batch's own labels. Rises add, as squared errors do; the cheapest densities are taken whose sum stays within `max_rise` of
the dense loss, or of what the dense predictions tell of the input where that is less, as of a new head. Costs are FLOPs: times would make
the choice the machine's.

A weight's density is chosen once for a limit: other graphs of the model, for other shapes, take the same. Under torch.distributed rank 0
chooses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from sptc.device.heap import give_back
from sptc.ir.plan import Choice, Plan, PlannedRegion
from sptc.ir.region import AttentionRegion, Cost, Counted, Decision, FfnRegion, LossRegion, Region, Settings, UnitSettings
from sptc.passes.decide.cost import kept_for_backward
from sptc.passes.decide.decisions import at_density, figures, left_out, pays, through_units
from sptc.passes.decide.planned import region_keys
from sptc.passes.decide.settings import attention_settings, measured, splits, tried, unfit
from sptc.passes.graph.effects import alias_sets, reads, written_by
from sptc.passes.graph.frame import frames, input_index, outermost, parameter
from sptc.passes.unit import Unit
from sptc.plans.beside import insert_beside, remove
from sptc.plans.budget import replan
from sptc.plans.runs import Runs

log = logging.getLogger(__name__)

_GROUPS = 12  # of FFNs, and as many of attention
_NOTHING = 1e-5  # nats, whose hundredth is what rounding in fp32 makes of a divergence
_FARTHEST = 64  # nodes between queries and what computes them


@dataclass(frozen=True)
class Rises:
    """What was measured: the dense loss (None: nothing was), by region and density what the loss rises by, and what was chosen."""

    loss: float | None
    of: Mapping[Region, Mapping[float, float]]
    chosen: Mapping[Region, float]


_chosen: Any = WeakTensorKeyDictionary()  # weight -> {(kind, whether the context was told apart, what was allowed): density}


def weigh(unit: Unit) -> Unit:
    """The unit with the densities of its FFNs chosen, where options leave that to measurement; others are as decided."""
    return _weighed(unit, _chosen, lambda unit, regions: _agreed(*_measure(unit, regions)[:2]))


def weigh_alone(unit: Unit) -> Unit:
    """What `weigh` would do, without telling other ranks or a later compile."""
    return _weighed(unit, WeakTensorKeyDictionary(_chosen), lambda unit, regions: _measure(unit, regions)[:2])


def weigh_and_tell(unit: Unit) -> tuple[Unit, Rises]:
    """`weigh_alone` of a unit of which no density is remembered, and what was measured."""
    told: list[Rises] = []

    def measure(unit: Unit, regions: Sequence[Region]) -> tuple[list[float] | None, str]:
        chosen, text, rises = _measure(unit, regions)
        told.append(rises)
        return chosen, text

    weighed = _weighed(unit, WeakTensorKeyDictionary(), measure)
    return weighed, told[0] if told else Rises(None, {}, {})


def _weighed(unit: Unit, remembered: Any, measure: Callable[[Unit, Sequence[Region]], tuple[list[float] | None, str]]) -> Unit:
    waiting = [r for d in unit.decisions if d.rewrite and not isinstance(r := d.region, LossRegion) and measured(unit, r)]
    unpredicting = [region for region in waiting if not _predicts(unit, region)]
    if unpredicting:  # a head beside the predictions: however it is thinned, they stay as they are
        unit = _with(unit, dict.fromkeys(unpredicting, 1.0), _unmeasured("the cross entropy does not depend on it; "))
        waiting = [region for region in waiting if region not in unpredicting]
    if not waiting:
        return unit
    weights = [_weight(unit, region) for region in waiting]
    cases = [(region.kind, splits(unit, region), unit.config.max_rise) for region in waiting]
    known = [remembered.get(w, {}).get(case) for w, case in zip(weights, cases, strict=True) if w is not None]
    if len(known) == len(waiting) and None not in known:
        return _with(unit, dict(zip(waiting, known, strict=True)), "as chosen on the first batch")
    if unit.config.max_rise == 0.0:
        return _with(unit, dict.fromkeys(waiting, 1.0), "the loss may not rise at all (max_rise)")
    reason = _obstacle(unit, weights)
    if reason is not None:
        return _with(unit, dict.fromkeys(waiting, 1.0), _unmeasured(reason))
    chosen, text = measure(unit, waiting)
    if chosen is None:  # of this batch; another may tell
        return _with(unit, dict.fromkeys(waiting, 1.0), _unmeasured(text))
    fresh: Any = WeakTensorKeyDictionary()
    for weight, case, density in zip(weights, cases, chosen, strict=True):
        told = fresh.setdefault(weight, {})
        told[case] = max(density, told.get(case, 0.0))  # of a weight in several places, what the one that needs most of it keeps
    for weight, told in fresh.items():
        remembered[weight] = {**remembered.get(weight, {}), **told}
    return _with(unit, dict(zip(waiting, chosen, strict=True)), text)


def _unmeasured(reason: str) -> str:
    return f"how much it may leave out can't be measured: {reason}set attention.density and ffn.density"


def _predicts(unit: Unit, region: Region) -> bool:
    """Whether the predictions that are measured may depend on a region; True where there are none."""
    if not isinstance(unit.counted, Counted):
        return True
    frame = next(frame for frame in frames(unit.gm) if frame.gm.graph is region.y.graph)
    path = frame.path()
    inside = region.y if len(path) == 1 else path[1].call
    return inside in reads(unit.counted.logits)


def _weight(unit: Unit, region: Region) -> Tensor | None:
    """The tensor that the density is remembered by: the down weight, or of attention the nearest matrix that queries are computed by."""
    frame = next(frame for frame in frames(unit.gm) if frame.gm.graph is region.y.graph)
    near = [parameter(region.down.weight)] if isinstance(region, FfnRegion) else _nearest(region.q)
    for node in near:
        index = input_index(outermost(node, frame))
        value = None if index is None else unit.example_inputs[index]
        if isinstance(value, Tensor) and (isinstance(region, FfnRegion) or (isinstance(value, nn.Parameter) and value.dim() > 1)):
            return value
    return None


def _nearest(node: Node) -> Iterator[Node]:
    """Inputs of its graph that a value is computed from, the nearest first."""
    waiting, seen = [node], {node}
    while waiting and len(seen) <= _FARTHEST:
        here = waiting.pop(0)
        if here.op == "placeholder":
            yield here
        fresh = [n for n in here.all_input_nodes if n not in seen]
        seen.update(fresh)
        waiting += fresh


def _obstacle(unit: Unit, weights: Sequence[Tensor | None]) -> str | None:
    """Why the graph can't be run on the batch to see what its FFNs are worth.

    What becomes of predictions outside of the graph is not guessed at: the same graph of hidden states and labels is that of a supervised
    loss, of a preference and of a reward, and only of the first does a divergence say what the loss rises by.
    """
    if unit.counted is None:
        return "the graph computes no cross entropy; let the model compute its loss from labels, in one graph with its layers, or "
    if not isinstance(unit.counted, Counted):
        return f"{unit.counted}; "
    if any(isinstance(x, FakeTensor) for x in unit.example_inputs):
        return "the graph is compiled without its inputs' values; "
    if any(weight is None for weight in weights):
        return "the weight of one is computed in the graph; "
    for frame in frames(unit.gm):
        written = [target for node in frame.gm.graph.nodes for target in written_by(node)]
        aliases = alias_sets(frame.gm.graph) if written else {}
        outer = {aliases[node] for node in frame.gm.graph.nodes if written and node.op in ("placeholder", "get_attr")}
        if any(aliases[target] in outer for target in written):
            return "the graph writes to its inputs; "
    return None


def _measure(unit: Unit, regions: Sequence[Region]) -> tuple[list[float] | None, str, Rises]:
    """Densities in the order of `regions`, and what was measured, for the report and for a plan; None and why the batch tells nothing."""
    keys = region_keys(unit.regions)
    exact = [r for r in regions if isinstance(r, AttentionRegion) and _by_sparse_kernel(unit, r)]
    candidates: dict[Region, tuple[Settings, ...]] = {
        r: tuple(at_density(unit, r, density)[0] for density in (*tried(unit, r), *([1.0] if r in exact else []))) for r in regions
    }
    groups = {keys[group[0]]: group for group in grouped(unit, regions)}
    settings = {
        key: {density: {keys[r]: at_density(unit, r, density)[0].density for r in group} for density in _tried(unit, group)}
        for key, group in groups.items()
    }
    beside = insert_beside(unit, candidates)
    try:
        runs = Runs(unit, beside, {keys[r]: 1.0 for r in exact})
        if not math.isfinite(runs.dense.loss):
            return None, f"the dense loss of the batch is {runs.dense.loss:g}{_uncounted(runs)}; ", Rises(None, {}, {})
        told = runs.dense.told
        if told < _NOTHING:
            return None, "the predictions of the batch are the same whatever it holds, as those of a new head; ", Rises(None, {}, {})
        allowed = unit.config.max_rise * min(runs.dense.loss, told)
        rises = runs.rises(settings, allowed)
    finally:
        remove(beside)
        give_back()  # the hidden values of a whole batch, which would stay with the process beneath what compiling takes

    def flops(key: str, density: float) -> float:
        costs = [at_density(unit, r, density)[1:] for r in groups[key]]
        return math.fsum((dense if density == 1.0 else sparse).flops for dense, sparse in costs)

    planned = []
    for key in groups:
        known = [d for d in settings[key] if rises.get((key, d), math.inf) <= allowed]
        choices = [Choice(d, flops(key, d), math.sqrt(rises[key, d])) for d in known]
        planned.append(PlannedRegion(key, (0,), {}, 1.0, (Choice(1.0, flops(key, 1.0), 0.0), *choices)))
    squares = {(r.key, c.density): c.error**2 for r in planned for c in r.choices}
    plan = replan(Plan({}, {}, 0.0, tuple(planned)), max_error=math.sqrt(allowed), squares=squares)
    log.info("densities: %s", {r.key: (r.density, {c.density: c.error**2 for c in r.choices}) for r in plan.regions})
    chosen = {region: r.density for r in plan.regions for region in groups[r.key]}
    text = f"measured: the loss of {runs.dense.loss:.3g} rises by {plan.error**2:.2g} with all densities so, before training"
    if told < runs.dense.loss:
        text += f", compared with the {told:.2g} nats that its predictions tell of the input"
    # A group's rise is shared out among its regions.
    shares = {r: {c.density: c.error**2 / len(groups[p.key]) for c in p.choices} for p in planned for r in groups[p.key]}
    return [chosen[region] for region in regions], text, Rises(runs.dense.loss, shares, chosen)


def _by_sparse_kernel(unit: Unit, region: AttentionRegion) -> bool:
    """Whether the runs compute it by the sparse kernel where it keeps all: whatever times say, so that no choice depends on them."""
    return not unit.device.gpu and not unfit(unit, region, attention_settings(unit, region, unit.states.get(region), 1.0))


def _uncounted(runs: Runs) -> str:
    return "" if len(runs.dense.logs) else ", since no label of it counts"


def _tried(unit: Unit, group: Sequence[Region]) -> list[float]:
    """The densities that are possible for all of a group."""
    return [density for density in tried(unit, group[0]) if all(density in tried(unit, region) for region in group)]


def grouped(unit: Unit, regions: Sequence[Region]) -> list[list[Region]]:
    """Runs of neighbours of a kind, the kinds one after the other."""
    return [group for kind in ("attention", "ffn") for group in _grouped(unit, [r for r in regions if r.kind == kind])]


def _grouped(unit: Unit, regions: Sequence[Region]) -> list[list[Region]]:
    """Runs of neighbours whose tokens are told apart alike, `_GROUPS` if all are; the first, as a rule the most sensitive, is alone."""
    groups: list[list[Region]] = []
    size = max(1, math.ceil((len(regions) - 1) / (_GROUPS - 1)))
    for i, region in enumerate(regions):
        if i <= 1 or (i - 1) % size == 0 or splits(unit, region) != splits(unit, groups[-1][0]):
            groups.append([])
        groups[-1].append(region)
    return groups


def _agreed(chosen: list[float] | None, text: str) -> tuple[list[float] | None, str]:
    """What rank 0 chose, where there are several."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return chosen, text
    shared: list[Any] = [chosen, text]
    dist.broadcast_object_list(shared)
    return shared[0], shared[1]


def _with(unit: Unit, densities: Mapping[Region, float], reason: str) -> Unit:
    """The unit with these densities; 1 leaves a region dense."""

    def decided() -> Iterator[Decision]:
        for decision in unit.decisions:
            if isinstance(decision.region, LossRegion) or decision.region not in densities:
                yield decision
                continue
            density = densities[decision.region]
            through = through_units(unit, decision.region) if density == 1.0 and isinstance(decision.region, FfnRegion) else None
            if through is not None:
                text = f"gradients through fewer units, forward all of them; {reason}{left_out(through[0])}"
                yield Decision(decision.region, True, text, *through)
                continue
            why = reason
            if density < 1.0:
                settings, dense, sparse = at_density(unit, decision.region, density)
                if pays(unit, decision.region, settings, dense, sparse):
                    same = settings == decision.settings or unit.config.decline == "never"
                    text = decision.reason if same else f"pays: {figures(settings, dense, sparse)}"
                    yield Decision(decision.region, True, f"{text}; {reason}", settings, dense, sparse)
                    continue
                why = f"at density {density:g} it would not pay: {figures(settings, dense, sparse)}; {reason}"
            settings, dense, sparse = at_density(unit, decision.region, 1.0)
            exact = pays(unit, decision.region, settings, dense, sparse)
            kept = f"kept whole; {why}" + (_exactly(settings, dense, sparse) if exact else "")
            yield Decision(decision.region, exact, kept, settings, dense, sparse)

    return replace(unit, decisions=tuple(decided()))


def _exactly(settings: Settings, dense: Cost, sparse: Cost) -> str:
    """What is saved although nothing that counts is left out: tokens that nothing reads, or the time of a slower kernel."""
    if isinstance(settings, UnitSettings):
        return left_out(settings)
    if sparse.seconds >= dense.seconds:
        return f", by the kernel of sparse attention: {kept_for_backward(dense, sparse)}"
    return f", by the kernel of sparse attention: {sparse.seconds * 1e3:.3g} ms, dense {dense.seconds * 1e3:.3g} ms"
