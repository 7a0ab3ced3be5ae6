"""Find every region of a graph and of the checkpoint bodies in it."""

from __future__ import annotations

from dataclasses import replace

from sptc.passes.find_attention import find_attention
from sptc.passes.find_ffn import find_ffn
from sptc.passes.frame import frames, operands
from sptc.passes.unit import Unit


def find(unit: Unit) -> Unit:
    """Fill `regions` and `refusals`, in the order of the model."""
    every = list(frames(unit.gm))
    outer = {inner: node for frame in every for inner, node in operands(frame).items()}
    found = [f for frame in every for f in (find_attention(frame.gm, outer), find_ffn(frame.gm))]
    regions = tuple(r for f in found for r in f.regions)
    return replace(unit, regions=regions, refusals=(*unit.refusals, *(r for f in found for r in f.refusals)))
