"""Decide which regions become sparse, and how: settings from options and prepared state, and whether it pays on this device.

With a symbolic length a decision is one comparison of that length with the length from which sparse pays, so Dynamo gets one guard and
compiles once for either side of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import guard_bool, has_free_unbacked_symbols, statically_known_true

from sptc.device.costs import DeviceCosts
from sptc.ir.hint import optimization_hint
from sptc.ir.region import (
    AttentionRegion,
    AttentionSettings,
    CodebookState,
    Cost,
    Counted,
    Decision,
    FfnRegion,
    FfnSettings,
    Refusal,
    Region,
    RouterState,
    Rows,
    Settings,
    State,
    UnitSettings,
)
from sptc.passes.decide.constraints import guardable, lower_bound
from sptc.passes.decide.cost import (
    AttentionShape,
    FfnShape,
    Size,
    Work,
    dense_attention,
    dense_ffn,
    ffn_over_units,
    ffn_through_units,
    share,
    sparse_attention,
    sparse_ffn,
)
from sptc.passes.decide.gradients import with_gradients
from sptc.passes.decide.loss import decide_loss
from sptc.passes.decide.operand_dtypes import misfit
from sptc.passes.decide.planned import planned_densities
from sptc.passes.decide.read_rows import read_rows
from sptc.passes.find.counted import counted_share, find_counted, fits
from sptc.passes.find.padding import visible_share
from sptc.passes.graph.pattern import argument, dtype, op, requires_grad, shape
from sptc.passes.unit import Unit

_LENGTH = sympy.Symbol("length", positive=True, integer=True)
_LONGEST = 1 << 24
_ROUTED_DENSITY = 1 / 2  # of ffn.density="auto"
TRIED = {True: (1 / 2, 1 / 8), False: (3 / 4, 1 / 2)}
"""Densities of hidden units that are measured: of tokens that do not count in the loss, and of all."""


def decide(unit: Unit) -> Unit:
    """Fill `decisions`, one a region in the order of `regions`, then those on losses.

    A loss whose logits the graph returns becomes a refusal of rule "logits" unless options drop them, a routed FFN whose hidden units can't
    be cut into equal blocks one of rule "blocks", attention in dtypes that the sparse operators don't compute in one of rule "dtype".
    """
    assert isinstance(unit.device, DeviceCosts), "decide needs the costs of the device"
    regions: list[Region] = []
    refusals: list[Refusal] = []
    for region in unit.regions:
        state = unit.states.get(region)
        if isinstance(region, FfnRegion) and routes(unit, region) and region.hidden % (blocks := _blocks(unit, state)):
            reason = f"{blocks} blocks do not divide {region.hidden} hidden units; choose another ffn.blocks"
            refusals.append(Refusal("ffn", "blocks", region.y, reason, region.site))
            continue
        if isinstance(region, AttentionRegion) and (reason := misfit(region, unit.device)):
            refusals.append(Refusal(region.kind, "dtype", region.y, reason, region.site))
            continue
        regions.append(region)
    unit = replace(unit, regions=tuple(regions), refusals=(*unit.refusals, *refusals))
    trained = with_gradients(unit)
    if trained:  # labels steer what is computed for a gradient, and nothing else
        unit = replace(unit, counted=find_counted(unit.gm))
        if isinstance(unit.counted, Counted):
            unit = replace(unit, counted_share=counted_share(unit.gm, unit.counted, unit.example_inputs))
        if unit.config.ffn_padding == "skip":
            unit = replace(unit, read=read_rows(unit), visible_share=visible_share(unit))
    planned = planned_densities(unit)
    losses = [decide_loss(unit, region, region in trained) for region in unit.losses]
    logits = frozenset(node for loss in losses if isinstance(loss, Decision) and loss.rewrite for node in loss.region.nodes)
    return replace(
        unit,
        refusals=(*unit.refusals, *(loss for loss in losses if isinstance(loss, Refusal))),
        decisions=(
            *(_decide(unit, region, planned.get(region), region in trained, region.y in logits) for region in regions),
            *(loss for loss in losses if isinstance(loss, Decision)),
        ),
    )


def routes(unit: Unit, region: FfnRegion) -> bool:
    """Whether an FFN becomes blocks for each token, as the paper has it, and not single units for many tokens."""
    return region in unit.states or unit.config.ffn_selector == "router"


def enabled(unit: Unit, region: Region) -> bool:
    """Whether the options let regions of this kind be rewritten."""
    return unit.config.ffn_enabled if region.kind == "ffn" else unit.config.attention_enabled


def at_density(unit: Unit, region: Region, density: float) -> tuple[Settings, Cost, Cost]:
    """How a region would become sparse at a density, and what it costs dense and sparse at the sizes of the example."""
    length = _length(region)
    settings, dense, sparse = _forms(unit, region, density, length)
    here = {_LENGTH: length.hint}
    return settings, dense.at(here), sparse.at(here)


def through_units(unit: Unit, region: FfnRegion) -> tuple[UnitSettings, Cost, Cost] | None:
    """How a region whose forward pass keeps all units would have its gradients go through fewer, and what it costs dense and so.

    None: options or the model leave nothing to save.
    """
    apart = unit.config.ffn_gradient_context_density is not None and _told_apart(unit, region)
    units = _units(region, unit.config.ffn_gradient_density)
    rows = unit.read.get(region, "all")
    context = _units(region, unit.config.ffn_gradient_context_density or 1.0) if apart and rows != "counted" else None
    settings = UnitSettings(region.hidden, units, context, gradients_only=True, rows=rows)
    length = _length(region)
    shape = _ffn_shape(region, unit.states.get(region), length)
    if settings.all_units or not shape.needs_hidden:
        return None
    here = {_LENGTH: length.hint}
    fewer = replace(shape, tokens=shape.tokens * _share(unit, rows))
    return settings, dense_ffn(shape, unit.device).at(here), ffn_through_units(fewer, settings, unit.device).at(here)


def _forms(unit: Unit, region: Region, density: float, length: _Length) -> tuple[Settings, Work, Work]:
    state = unit.states.get(region)
    if isinstance(region, FfnRegion):
        ffn = _ffn_shape(region, state, length)
        if routes(unit, region):
            routed = _ffn_settings(unit, region, state, density)
            return routed, dense_ffn(ffn, unit.device), sparse_ffn(ffn, routed, unit.device)
        kept = _unit_settings(unit, region, density)
        fewer = replace(ffn, tokens=ffn.tokens * _share(unit, kept.rows))
        return kept, dense_ffn(ffn, unit.device), ffn_over_units(fewer, kept, unit.device)
    attention, settings = _attention_shape(region, length), _attention_settings(unit, region, state, density)
    return settings, dense_attention(attention, unit.device), sparse_attention(attention, settings, unit.device)


def _decide(unit: Unit, region: Region, planned: float | None, trained: bool, logits: bool) -> Decision:
    """The decision on one region.

    Args:
        planned: its density in the plan, None without one.
        trained: gradients are recorded there.
        logits: its output is what a rewritten loss computes by itself.
    """
    length = _length(region)
    settings, dense, sparse = _forms(unit, region, uniform_density(unit, region) if planned is None else planned, length)
    here = {_LENGTH: length.hint}
    costs = dense.at(here), sparse.at(here)
    if not enabled(unit, region):
        return Decision(region, False, f"option '{region.kind}.enabled' is False", settings, *costs)
    if logits:
        return Decision(region, False, "its output is logits of a loss that is rewritten", settings, *costs)
    if planned == 1.0 and not (isinstance(settings, UnitSettings) and not settings.whole):
        return Decision(region, False, "the plan keeps it dense", settings, *costs)
    if not trained and unit.config.inference == "dense" and ("inference" in unit.config.given or not unit.states):
        return Decision(region, False, "no gradient is recorded here, and option 'inference' is 'dense'", settings, *costs)
    if region in unit.states:  # what a trained model computes must not depend on how fast this machine is
        return Decision(region, True, "it has trained state", settings, *costs)
    if isinstance(settings, AttentionSettings) and (reason := _specializes(unit, region, settings)):
        return Decision(region, False, reason, settings, *costs)
    if unit.config.decline == "never":
        return Decision(region, True, "option 'decline' is 'never'", settings, *costs)
    if isinstance(settings, UnitSettings) and settings.whole:
        return Decision(region, False, "at density 1 nothing would be left out", settings, *costs)
    rewrite, border = _pays(unit, dense, sparse, length)
    figures = f"{_time(costs[1].seconds)} sparse, {_time(costs[0].seconds)} dense{left_out(settings)}"
    reason = f"pays: {figures}" if rewrite else f"would not pay: {figures}"
    return Decision(region, rewrite, reason + border, settings, *costs)


def left_out(settings: Settings) -> str:
    """Which tokens are left out because nothing reads them, for people."""
    rows = settings.rows if isinstance(settings, UnitSettings) else "all"
    return {"all": "", "visible": ", padding left out", "counted": ", for the tokens that count alone"}[rows]


def _share(unit: Unit, rows: Rows) -> sympy.Rational:
    """The share of the example's tokens that are in `rows`, in hundredths."""
    known = {"all": 1.0, "visible": unit.visible_share, "counted": unit.counted_share}[rows]
    return sympy.Rational(100 if known is None else max(1, round(100 * known)), 100)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


@dataclass(frozen=True)
class _Length:
    """What a region's cost varies with: tokens of an FFN, queries of attention, or the first other symbolic size."""

    size: int | torch.SymInt
    hint: int

    def __call__(self, size: int | torch.SymInt) -> Size:
        """A size as an expression in the length; symbols other than the length's are fixed at their hints."""
        if isinstance(size, int):
            return size
        if isinstance(self.size, torch.SymInt):
            own, expression = self.size.node.expr, size.node.expr
            if own == expression:
                return _LENGTH
            if own.is_Symbol and expression.has(own):
                others = {
                    s: optimization_hint(size.node.shape_env.create_symintnode(s, hint=None)) for s in expression.free_symbols - {own}
                }
                return expression.xreplace({**others, own: _LENGTH})
        return optimization_hint(size)


def _length(region: Region) -> _Length:
    if isinstance(region, FfnRegion):
        size = math.prod(shape(region.x)[:-1])
        return _Length(size, optimization_hint(size))
    b, h, n, _ = _four(shape(region.q))
    m = shape(region.k)[-2]
    symbolic = [size for size in (n, m, b, h) if isinstance(size, torch.SymInt)]
    size = symbolic[0] if symbolic else n
    return _Length(size, optimization_hint(size))


def _four(sizes: tuple[int | torch.SymInt, ...]) -> tuple[int | torch.SymInt, ...]:
    return sizes if len(sizes) == 4 else (1, *sizes)


def _pays(unit: Unit, dense: Work, sparse: Work, length: _Length) -> tuple[bool, str]:
    """Whether sparse is faster, and for a symbolic length from where on.

    Where the user's constraints allow no guard that would tell the two sides apart, the example's side is taken for all lengths.
    """
    difference = sympy.lambdify(_LENGTH, sparse.seconds - dense.seconds, modules="math")
    if not isinstance(length.size, torch.SymInt) or has_free_unbacked_symbols(length.size):  # nothing can be guarded on data
        return bool(difference(length.hint) < 0), ""
    border = crossover(difference, length.hint)
    if border is None:
        return bool(difference(length.hint) < 0), ""
    above, below = length.size >= border, length.size < border
    if not (statically_known_true(above) or statically_known_true(below) or guardable(length.size, unit.gm, unit.example_inputs)):
        return bool(difference(length.hint) < 0), f" at {length.hint}, chosen for the whole range that mark_dynamic was given"
    return guard_bool(above), f"; sparse from {border} on"


def _specializes(unit: Unit, region: Region, settings: AttentionSettings) -> str:
    """Why sparse attention would break the promise of mark_dynamic; "" if it does not. Torch guards on sizes of 1, as of a single tile."""
    assert isinstance(region, AttentionRegion)
    for size, least in ((shape(region.q)[-2], settings.query_block), (shape(region.k)[-2], settings.key_block / settings.density)):
        if isinstance(size, torch.SymInt) and not guardable(size, unit.gm, unit.example_inputs) and lower_bound(size) <= least:
            return f"mark_dynamic was given lengths from {lower_bound(size)} on; one compile for all of them needs more than {least:.0f}"
    return ""


def crossover(difference: Callable[[int], float], hint: int) -> int | None:
    """The least length, towards the hint's other side, from which `difference` is negative; None if the decision is the same everywhere.

    Overheads are what sparse loses by, so it is taken to win above a length and lose below it.
    """
    if difference(hint) < 0:
        low, high = 2, hint
        if difference(low) < 0:
            return None
    else:
        low = high = hint
        while difference(high) >= 0:
            low, high = high, 2 * high
            if high > _LONGEST:
                return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if difference(middle) < 0 else (middle, high)
    return high


def _blocks(unit: Unit, state: State | None) -> int:
    return int(shape(state.weight)[0]) if isinstance(state, RouterState) else unit.config.ffn_blocks


def _ffn_settings(unit: Unit, region: FfnRegion, state: State | None, density: float) -> FfnSettings:
    blocks, kept = _blocks(unit, state), share(density)
    active = -(-kept.numerator * blocks // kept.denominator)
    keep = unit.config.ffn_keep == "loss" and 1 < active < blocks and isinstance(unit.counted, Counted) and fits(unit.counted.lead, region)
    return FfnSettings(blocks, active, keep)


def uniform_density(unit: Unit, region: Region) -> float:
    """The density that the options give to a region: of the tokens that do not count, where these keep other units than the rest."""
    if region.kind == "attention":
        return unit.config.attention_density
    if routes(unit, region):
        return _ROUTED_DENSITY if unit.config.ffn_density == "auto" else unit.config.ffn_density
    given = unit.config.ffn_context_density if splits(unit, region) else unit.config.ffn_density
    assert given is not None
    return min(TRIED[splits(unit, region)]) if given == "auto" else given


def measured(unit: Unit, region: Region) -> bool:
    """Whether the density of a region is to be measured on the example batch, not given."""
    if region.kind == "attention" or routes(unit, region) or unit.plan is not None:
        return False
    if splits(unit, region) and unit.read.get(region) == "counted":
        return False  # there is no context
    return (unit.config.ffn_context_density if splits(unit, region) else unit.config.ffn_density) == "auto"


def splits(unit: Unit, region: FfnRegion) -> bool:
    """Whether tokens that count in the loss keep other units than those that do not: not where next to all of them count."""
    return unit.config.ffn_context_density is not None and _told_apart(unit, region)


def _told_apart(unit: Unit, region: FfnRegion) -> bool:
    if not isinstance(unit.counted, Counted) or not fits(unit.counted.lead, region):
        return False
    return unit.counted_share is None or unit.counted_share <= _MOST


_MOST = 0.9  # of the tokens of the example batch that may count, if the others are to be told apart


def _unit_settings(unit: Unit, region: FfnRegion, density: float) -> UnitSettings:
    rows = unit.read.get(region, "all")
    if not splits(unit, region):
        return UnitSettings(region.hidden, _units(region, density), rows=rows)
    counted = unit.config.ffn_density
    context = None if rows == "counted" else _units(region, density)
    return UnitSettings(region.hidden, _units(region, 1.0 if counted == "auto" else counted), context, rows=rows)


def _units(region: FfnRegion, density: float) -> int:
    kept = share(density)
    return -(-kept.numerator * region.hidden // kept.denominator)


def _attention_settings(unit: Unit, region: AttentionRegion, state: State | None, density: float) -> AttentionSettings:
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


def _attention_shape(region: AttentionRegion, length: _Length) -> AttentionShape:
    b, h, n, d = (length(size) for size in _four(shape(region.q)))
    _, h_kv, m, d_v = (length(size) for size in _four(shape(region.v)))
    kernels = [node for node in region.nodes if op(node) == "aten.scaled_dot_product_attention.default"]
    trains = requires_grad(region.y)
    return AttentionShape(
        *(b, h, h_kv, n, m, d, d_v),
        dtype=dtype(region.y),
        fused=bool(kernels),
        halved=bool(kernels) and argument(kernels[0], 5, "is_causal", False) is True,
        own=region.mask.causal,
        need=(trains and requires_grad(region.q), trains and requires_grad(region.k), trains and requires_grad(region.v)),
    )


def _ffn_shape(region: FfnRegion, state: State | None, length: _Length) -> FfnShape:
    trains, tokens = requires_grad(region.y), math.prod(shape(region.x)[:-1])
    adapters = [up.lora for up in region.ups if up.lora is not None]
    down = region.down.lora
    every = [*adapters, *([down] if down is not None else [])]
    return FfnShape(
        tokens=length(tokens),
        d=int(shape(region.x)[-1]),
        hidden=region.hidden,
        d_out=int(shape(region.y)[-1]),
        ups=len(region.ups),
        up_ranks=sum(int(shape(lora.a)[0]) for lora in adapters),
        down_rank=int(shape(down.a)[0]) if down is not None else 0,
        dtype=dtype(region.y),
        stand_in_rank=int(shape(state.low)[0]) if isinstance(state, RouterState) else 0,
        trained_router=isinstance(state, RouterState) and state.training,
        need_x=trains and requires_grad(region.x),
        need_ups=sum(trains and requires_grad(up.weight) for up in region.ups),
        need_down=trains and requires_grad(region.down.weight),
        need_adapters=trains and any(requires_grad(lora.b) for lora in every),
    )
