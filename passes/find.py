"""Find every region of a graph and of the checkpoint bodies in it."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sptc.passes.find_attention import find_attention
from sptc.passes.find_ffn import find_ffn
from sptc.passes.frame import frames, operands
from sptc.passes.lookalike import ffn_refusals
from sptc.passes.unit import Unit
from sptc.region import Found


def find(unit: Unit) -> Unit:
    """Fill `regions` and `refusals`, in the order of the model."""
    every = list(frames(unit.gm))
    outer = {inner: node for frame in every for inner, node in operands(frame).items()}
    found = [f for frame in every for f in (find_attention(frame.gm, outer), _every_ffn(frame.gm))]
    regions = tuple(r for f in found for r in f.regions)
    return replace(unit, regions=regions, refusals=(*unit.refusals, *(r for f in found for r in f.refusals)))


def _every_ffn(gm: fx.GraphModule) -> Found:
    """FFN regions, and refusals of all that is like one."""
    found = find_ffn(gm)
    known = {node for region in found.regions for node in region.nodes} | {refusal.node for refusal in found.refusals}
    return replace(found, refusals=(*found.refusals, *ffn_refusals(gm, known)))
