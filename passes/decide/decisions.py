"""Decide which regions become sparse, and how: settings from options and prepared state, and whether it pays on this device.

With a symbolic length a decision is one comparison of that length with the length from which sparse pays, so Dynamo gets one guard and
compiles once for either side of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import guard_bool, has_free_unbacked_symbols, statically_known_true

from sptc.device.costs import DeviceCosts
from sptc.ir.plan import PlannedRegion
from sptc.ir.region import (
    AttentionRegion,
    AttentionSettings,
    Cost,
    Counted,
    Decision,
    FfnRegion,
    Refusal,
    Region,
    Rows,
    Settings,
    UnitSettings,
)
from sptc.passes.decide.constraints import guardable
from sptc.passes.decide.cost import (
    FfnShape,
    Work,
    dense_attention,
    dense_ffn,
    ffn_over_units,
    ffn_through_units,
    kept_for_backward,
    sparse_attention,
    sparse_ffn,
)
from sptc.passes.decide.gradients import with_gradients
from sptc.passes.decide.loss import decide_loss, keeps_logits
from sptc.passes.decide.operand_dtypes import misfit
from sptc.passes.decide.planned import planned_lean, planned_regions
from sptc.passes.decide.read_rows import read_rows
from sptc.passes.decide.settings import (
    attention_settings,
    blocks_of,
    computed_again,
    enabled,
    routed_settings,
    routes,
    splits,
    told_apart,
    unfit,
    uniform_density,
    unit_settings,
    units_of,
)
from sptc.passes.decide.sizes import LENGTH, Length, attention_shape, ffn_shape, length_of
from sptc.passes.find.counted import counted_share, find_counted
from sptc.passes.find.padding import visible_share
from sptc.passes.unit import Unit

_LONGEST = 1 << 24


def decide(unit: Unit) -> Unit:
    """Fill `decisions`, one a region in the order of `regions`, then those on losses.

    A loss whose logits the graph returns in part or twice becomes a refusal of rule "logits" unless options drop them, a routed FFN whose
    hidden units can't be cut into equal blocks one of rule "blocks", attention in dtypes that the sparse operators don't compute in one of
    rule "dtype".
    """
    assert isinstance(unit.device, DeviceCosts), "decide needs the costs of the device"
    regions: list[Region] = []
    refusals: list[Refusal] = []
    for region in unit.regions:
        state = unit.states.get(region)
        if isinstance(region, FfnRegion) and routes(unit, region) and region.hidden % (blocks := blocks_of(unit, state)):
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
    losses = [decide_loss(unit, region, region in trained) for region in unit.losses]
    by_rows = [loss.region for loss in losses if isinstance(loss, Decision) and loss.rewrite]
    dropped = [loss.region for loss in losses if isinstance(loss, Decision) and loss.rewrite and not keeps_logits(loss)]
    if trained and unit.config.ffn_padding == "skip":
        unit = replace(unit, read=read_rows(unit, frozenset(dropped)), visible_share=visible_share(unit))
    planned = planned_regions(unit)
    unit = replace(unit, lean=planned_lean(unit))
    logits = frozenset(node for region in by_rows for node in region.nodes)
    return replace(
        unit,
        refusals=(*unit.refusals, *(loss for loss in losses if isinstance(loss, Refusal))),
        decisions=(
            *(_decide(unit, region, planned.get(region), region in trained, region.y in logits) for region in regions),
            *(loss for loss in losses if isinstance(loss, Decision)),
        ),
    )


def at_density(unit: Unit, region: Region, density: float) -> tuple[Settings, Cost, Cost]:
    """How a region would become sparse at a density, and what it costs dense and sparse at the sizes of the example."""
    length = length_of(region)
    settings, dense, sparse = _forms(unit, region, density, length)
    here = {LENGTH: length.hint}
    return settings, dense.at(here), sparse.at(here)


def through_units(unit: Unit, region: FfnRegion) -> tuple[UnitSettings, Cost, Cost] | None:
    """How a region whose forward pass keeps all units would have its gradients go through fewer, and what it costs dense and so.

    None: options or the model leave nothing to save.
    """
    apart = unit.config.ffn_gradient_context_density is not None and told_apart(unit, region)
    units = units_of(region, unit.config.ffn_gradient_density)
    rows = unit.read.get(region, "all")
    context = units_of(region, unit.config.ffn_gradient_context_density or 1.0) if apart and rows != "counted" else None
    settings = UnitSettings(region.hidden, units, context, True, rows, computed_again(unit, region))
    length = length_of(region)
    shape = ffn_shape(region, unit.states.get(region), length)
    if settings.all_units or not shape.needs_hidden:
        return None
    here = {LENGTH: length.hint}
    fewer = _kept_tokens(unit, shape, rows)
    return settings, dense_ffn(shape, unit.device).at(here), ffn_through_units(fewer, settings, unit.device).at(here)


def _forms(unit: Unit, region: Region, density: float, length: Length) -> tuple[Settings, Work, Work]:
    state = unit.states.get(region)
    if isinstance(region, FfnRegion):
        ffn = ffn_shape(region, state, length)
        if routes(unit, region):
            routed = routed_settings(unit, region, state, density)
            return routed, dense_ffn(ffn, unit.device), sparse_ffn(ffn, routed, unit.device)
        kept = unit_settings(unit, region, density)
        return kept, dense_ffn(ffn, unit.device), ffn_over_units(_kept_tokens(unit, ffn, kept.rows), kept, unit.device)
    attention, settings = attention_shape(region, length), attention_settings(unit, region, state, density)
    return settings, dense_attention(attention, unit.device), sparse_attention(attention, settings, unit.device)


def _decide(unit: Unit, region: Region, planned: PlannedRegion | None, trained: bool, logits: bool) -> Decision:
    """The decision on one region.

    Args:
        planned: what the plan has of it, None without one.
        trained: gradients are recorded there.
        logits: its output is what a rewritten loss computes by itself.
    """
    length = length_of(region)
    blurred = planned is not None and planned.apart and planned.density < 1.0 and not splits(unit, region)
    density = uniform_density(unit, region) if planned is None else 1.0 if blurred else planned.density
    settings, dense, sparse = _forms(unit, region, density, length)
    here = {LENGTH: length.hint}
    costs = dense.at(here), sparse.at(here)
    if not enabled(unit, region):
        return Decision(region, False, f"option '{region.kind}.enabled' is False", settings, *costs)
    if logits:
        return Decision(region, False, "its output is logits of a loss that is rewritten", settings, *costs)
    less = settings.recompute if isinstance(settings, UnitSettings) else region in unit.lean or unit.config.objective == "memory"
    if planned is not None and density == 1.0 and not less and not _may_be_exact(unit, settings):
        apart = "the plan's density is that of tokens whose label does not count, which are not told apart here"
        return Decision(region, False, apart if blurred and trained else "the plan keeps it dense", settings, *costs)
    if not trained and unit.config.inference == "dense" and ("inference" in unit.config.given or not unit.states):
        return Decision(region, False, "no gradient is recorded here, and option 'inference' is 'dense'", settings, *costs)
    if region in unit.states:  # what a trained model computes must not depend on how fast this machine is
        return Decision(region, True, "it has trained state", settings, *costs)
    if isinstance(region, AttentionRegion) and isinstance(settings, AttentionSettings) and (reason := unfit(unit, region, settings)):
        return Decision(region, False, reason, settings, *costs)
    if unit.config.decline == "never":
        return Decision(region, True, "option 'decline' is 'never'", settings, *costs)
    if isinstance(settings, UnitSettings) and settings.recompute and unit.config.ffn_recompute and trained:
        return Decision(region, True, "option 'ffn.recompute' is True", settings, *costs)
    if isinstance(settings, UnitSettings) and settings.whole:
        return Decision(region, False, "at density 1 nothing would be left out", settings, *costs)
    if region in unit.lean and trained and costs[1].kept < costs[0].kept:
        return Decision(region, True, f"the plan wants it lean: {kept_for_backward(*costs)}{left_out(settings)}", settings, *costs)
    if unit.config.objective == "memory" and trained and costs[1].kept != costs[0].kept:
        smaller, kept = costs[1].kept < costs[0].kept, kept_for_backward(*costs)
        return Decision(region, smaller, f"{'pays' if smaller else 'would not pay'}: {kept}{left_out(settings)}", settings, *costs)
    rewrite, border = _pays(unit, dense, sparse, length)
    reason = f"{'pays' if rewrite else 'would not pay'}: {figures(settings, *costs)}"
    return Decision(region, rewrite, reason + border, settings, *costs)


def _may_be_exact(unit: Unit, settings: Settings) -> bool:
    """Whether the sparse form can be the faster one although nothing that counts is left out, if it need not be taken in any case."""
    if isinstance(settings, UnitSettings):
        return not settings.whole
    measured = unit.plan is not None and "max_rise" in unit.plan.target  # as without a plan; others have dense attention's time and bytes
    return measured and isinstance(settings, AttentionSettings) and settings.selector == "pooled" and unit.config.decline == "auto"


def lean_form(unit: Unit, region: Region) -> tuple[Settings, Cost, Cost] | None:
    """How a region would keep less for backward and leave nothing out, and what it costs dense and so; None where it can't."""
    if not enabled(unit, region) or region in unit.states or (isinstance(region, FfnRegion) and routes(unit, region)):
        return None
    if isinstance(region, FfnRegion) and unit.config.ffn_recompute is False:
        return None
    settings, dense, sparse = at_density(replace(unit, lean=unit.lean | {region}), region, 1.0)
    if isinstance(region, AttentionRegion) and isinstance(settings, AttentionSettings) and unfit(unit, region, settings):
        return None
    return (settings, dense, sparse) if sparse.kept < dense.kept else None


def pays(unit: Unit, region: Region, settings: Settings, dense: Cost, sparse: Cost) -> bool:
    """Whether a region is better in its sparse form by these settings, where gradients are recorded; at density 1 it may be as well."""
    if unit.config.decline == "never":
        better = True
    elif unit.config.objective == "memory" and sparse.kept != dense.kept:
        better = sparse.kept < dense.kept
    else:
        better = sparse.seconds < dense.seconds
    if isinstance(settings, UnitSettings):
        return not settings.whole and (better or (settings.recompute and bool(unit.config.ffn_recompute)))
    if isinstance(region, AttentionRegion) and isinstance(settings, AttentionSettings):
        return better and not unfit(unit, region, settings)
    return better


def figures(settings: Settings, dense: Cost, sparse: Cost) -> str:
    """What a region costs in both forms, for people."""
    return f"{_time(sparse.seconds)} sparse, {_time(dense.seconds)} dense{left_out(settings)}"


def left_out(settings: Settings) -> str:
    """Which tokens are left out because nothing reads them, and what is not kept, for people."""
    if not isinstance(settings, UnitSettings):
        return ""
    rows = {"all": "", "visible": ", padding left out", "counted": ", for the tokens that count alone"}[settings.rows]
    again = ", hidden values computed again in backward" * settings.recompute
    return rows + again + (f", {settings.chunk} tokens at a time" if settings.chunk is not None else "")


def _kept_tokens(unit: Unit, ffn: FfnShape, rows: Rows) -> FfnShape:
    """The FFN of the tokens in `rows` alone, with the share of these that count, both as in the example batch, in hundredths."""
    of = {"all": 1.0, "visible": unit.visible_share, "counted": unit.counted_share}[rows]
    kept = sympy.Rational(100 if of is None else max(1, round(100 * of)), 100)
    if unit.counted_share is None:
        return replace(ffn, tokens=ffn.tokens * kept)
    counted = sympy.Rational(round(100 * unit.counted_share), 100)
    return replace(ffn, tokens=ffn.tokens * kept, counted=min(sympy.S.One, counted / kept))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _pays(unit: Unit, dense: Work, sparse: Work, length: Length) -> tuple[bool, str]:
    """Whether sparse is faster, and for a symbolic length from where on.

    Where the user's constraints allow no guard that would tell the two sides apart, the example's side is taken for all lengths.
    """
    difference = sympy.lambdify(LENGTH, sparse.seconds - dense.seconds, modules="math")
    if not isinstance(length.size, torch.SymInt) or has_free_unbacked_symbols(length.size):  # nothing can be guarded on data
        return bool(difference(length.hint) < 0), ""
    border = crossover(difference, length.hint)
    if border is None:
        return bool(difference(length.hint) < 0), ""
    above, below = length.size >= border, length.size < border
    if not (statically_known_true(above) or statically_known_true(below) or guardable(length.size, unit.gm, unit.example_inputs)):
        return bool(difference(length.hint) < 0), f" at {length.hint}, chosen for the whole range that mark_dynamic was given"
    return guard_bool(above), f"; sparse from {border} on"


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
