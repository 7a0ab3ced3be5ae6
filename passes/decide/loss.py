"""Decide which losses are computed some rows at a time. The result is exact, so what is judged is memory, from sizes alone."""

from __future__ import annotations

import math

from torch.fx import Node

from sptc.ir.hint import optimization_hint
from sptc.ir.region import Decision, LossRegion, LossSettings, Refusal
from sptc.passes.decide.cost import LossShape, dense_loss, kept_for_backward, loss_by_rows
from sptc.passes.find.loss import needed
from sptc.passes.find.returned import ends_at_a_break, logits_given, source_of
from sptc.passes.graph.pattern import shape, value
from sptc.passes.unit import Unit

_BUFFER = {"cpu": 32 << 20, "cuda": 256 << 20}  # bytes of the logits that stand in memory at a time
_MOST_ROWS = {"cpu": 256}  # at a time: enough for products at full speed, and with few classes logits that stay in the cache
_LEAST_ROWS = 16
_FEW = 2  # classes for each feature up to which the logits take no more than what replaces them


def decide_loss(unit: Unit, region: LossRegion, recorded: bool) -> Decision | Refusal:
    """The decision on one loss; a refusal of rule "logits" where all logits are computed besides, since the graph returns them and options
    keep that, or reads them, and the loss can't take them from there (`logits_given`).

    `recorded`: gradients are recorded where it stands.
    """
    keep = bool(region.returned) and unit.config.loss_logits != "drop"
    besides = keep or bool(region.readers)
    given = logits_given(unit, region, keep) if besides else None
    deferred = given is not None and _deferred(unit, region, given[0])
    settings = LossSettings(_rows(region)) if given is None else LossSettings(_rows(region), not deferred, *given, deferred)
    sizes = _shape(unit, region, besides and not deferred)
    costs = dense_loss(sizes, unit.device).at({}), loss_by_rows(sizes, unit.device).at({})
    dense, by_rows = costs
    features = sizes.d
    if not unit.config.loss_enabled:
        return Decision(region, False, "option 'loss.enabled' is False", settings, *costs)
    if not recorded or not any(needed(region)):
        return Decision(region, False, "no gradient is recorded here", settings, *costs)
    kept = kept_for_backward(dense, by_rows)
    if unit.config.decline == "auto" and unit.config.objective == "memory":
        if by_rows.kept >= dense.kept:
            return Decision(region, False, f"would not pay: {kept}", settings, *costs)
    elif unit.config.decline == "auto" and region.classes <= _FEW * features:
        return Decision(region, False, f"would not pay: {region.classes} classes of {features} features", settings, *costs)
    returned, reading = (", ".join(node.name for node in nodes) for nodes in (region.returned, region.readers))
    if besides and given is None:
        reason = f"the graph returns its logits ({returned}); options={{'loss.logits': 'drop'}} would not, with {kept}"
        if reading:
            results = f", the graph returns them ({returned})" if returned else ""
            reason = f"{reading} reads its logits{results}, and the loss can't take them from there"
        return Refusal("loss", "logits", region.y, reason, region.site)
    how = "computed once they are used" if deferred else "computed besides" if keep else "dropped"
    logits = f", and the logits that the graph returns ({returned}) are {how}" if returned else ""
    logits += f", and those that {reading} reads are computed besides" if reading else ""
    return Decision(region, True, f"pays: {kept}{logits}", settings, *costs)


def keeps_logits(decision: Decision) -> bool:
    """Whether the user's code may still read the logits of a loss that is rewritten: those that are computed, now or later."""
    return isinstance(decision.settings, LossSettings) and (decision.settings.given or decision.settings.deferred)


def _deferred(unit: Unit, region: LossRegion, place: int | None) -> bool:
    """Whether the logits that the graph returns are computed once something uses them. Code behind a graph break is taken to use them."""
    if unit.config.loss_logits != "defer" or place is None or region.readers or ends_at_a_break(unit.gm):
        return False
    return source_of(unit, region, place) is not None


def _rows(region: LossRegion) -> int:
    device, wide = value(region.projection.y).device.type, 8 if region.product.itemsize == 8 else 4
    rows = _BUFFER.get(device, _BUFFER["cpu"]) // (region.classes * wide)
    return max(_LEAST_ROWS, min(rows - rows % _LEAST_ROWS, _MOST_ROWS.get(device, rows)))


def _shape(unit: Unit, region: LossRegion, keep: bool) -> LossShape:
    lora = region.projection.lora
    need_x, need_weight, _, _, need_up = needed(region)
    x: Node = region.projection.x
    return LossShape(
        rows=optimization_hint(math.prod(shape(x)[:-1])),
        counted=1.0 if unit.counted_share is None else unit.counted_share,
        d=int(shape(x)[-1]),
        classes=region.classes,
        rank=0 if lora is None else int(shape(lora.a)[0]),
        dtype=region.product,
        need_x=need_x,
        need_weight=need_weight,
        need_adapter=need_up,
        returned=keep,
    )
