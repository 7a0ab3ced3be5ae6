"""Find every region of a graph and of the checkpoint bodies in it."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sptc.config import Config
from sptc.ir.region import FfnRegion, Found, LossRegion, Refusal, Region
from sptc.passes.find.attention import find_attention
from sptc.passes.find.ffn import find_ffn
from sptc.passes.find.lookalike import ffn_refusals
from sptc.passes.find.loss import find_loss
from sptc.passes.find.spare import excluding, is_trained_head
from sptc.passes.graph.frame import frames, operands
from sptc.passes.graph.pattern import match_adapters, origin_of_units
from sptc.passes.unit import Unit


def find(unit: Unit) -> Unit:
    """Fill `regions`, `losses` and `refusals`, in the order of the model; what is left alone is a refusal of rule "exclude" or "head"."""
    every = list(frames(unit.gm))
    outer = {inner: node for frame in every for inner, node in operands(frame).items()}
    found = [f for frame in every for f in (find_attention(frame.gm, outer), _every_ffn(frame.gm))]
    losses = [find_loss(frame.gm, returns=frame.call is None) for frame in every]
    every_region = [*(r for f in found for r in f.regions), *(r for regions, _ in losses for r in regions)]
    spared = {region: refusal for region in every_region if (refusal := _spared(region, unit.config)) is not None}
    return replace(
        unit,
        regions=tuple(r for r in every_region if r not in spared and not isinstance(r, LossRegion)),
        losses=tuple(r for r in every_region if r not in spared and isinstance(r, LossRegion)),
        refusals=(*unit.refusals, *(r for f in found for r in f.refusals), *(r for _, more in losses for r in more), *spared.values()),
        unmatched=tuple(p for p in unit.config.exclude or () if not any(excluding(region, [p]) for region in every_region)),
    )


def _spared(region: Region | LossRegion, config: Config) -> Refusal | None:
    """Why a region is left alone; None if it is not."""
    pattern = excluding(region, config.exclude or ())
    if pattern is not None:
        return Refusal(region.kind, "exclude", region.y, f"option 'exclude' names it: {pattern!r}", region.site)
    if config.exclude != [] and isinstance(region, FfnRegion) and is_trained_head(region):
        reason = "a head that is trained and adds to no residual stream; exclude=[] would have it rewritten"
        return Refusal(region.kind, "head", region.y, reason, region.site)
    return None


def _every_ffn(gm: fx.GraphModule) -> Found:
    """FFN regions, and refusals of all that is like one."""
    found = find_ffn(gm)
    known = {node for region in found.regions for node in region.nodes}
    strangers = {refusal.node for refusal in found.refusals if refusal.rule == "operand"}
    for refusal in found.refusals:
        adapted = match_adapters(refusal.node)
        known |= {refusal.node} if adapted is None else {refusal.node, origin_of_units(adapted[0].x)}
    return replace(found, refusals=(*found.refusals, *ffn_refusals(gm, known, strangers)))
