"""Find every region of a graph and of the checkpoint bodies in it."""

from __future__ import annotations

from dataclasses import replace

from sptc.passes.find_attention import find_attention

from sptc.passes.find_ffn import find_ffn
from sptc.passes.normalize import graphs
from sptc.passes.unit import Unit


def find(unit: Unit) -> Unit:
    """Fill `regions` and `refusals`, in the order of the model."""
    found = [f(gm) for gm in graphs(unit.gm) for f in (find_attention, find_ffn)]
    regions = tuple(r for f in found for r in f.regions)
    return replace(unit, regions=regions, refusals=(*unit.refusals, *(r for f in found for r in f.refusals)))
