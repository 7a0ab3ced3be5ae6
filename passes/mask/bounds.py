"""Bounds of a number over all positions: what is known of it while a mask is read."""

from __future__ import annotations

import torch
from torch.fx import Node

from sptc.ir.condition import Element, Expression, Index, Size
from sptc.ir.intervals import Interval, Intervals
from sptc.passes.graph.pattern import dtype

_MOST = 1 << 63  # no integer of a tensor is larger


class Everywhere(Intervals[int]):
    """Bounds over all positions."""

    def constant(self, value: int | bool) -> int:
        return value

    def leaf(self, tree: Expression) -> Interval[int]:
        match tree:
            case Index(_, limit):
                return Interval(0, _MOST if limit is None else limit - 1)
            case Size():
                return Interval(0, _MOST)
            case Element(Node() as node, _):
                kind = dtype(node)
                if kind is not None and not kind.is_floating_point:
                    return Interval(0, 1) if kind == torch.bool else Interval(torch.iinfo(kind).min, torch.iinfo(kind).max)
        return Interval(-_MOST, _MOST)

    def sign(self, value: int) -> int:
        return value

    def positive(self, value: int) -> bool | None:
        return value > 0 or None

    def remainders(self, low: int, high: int, divisor: int) -> tuple[int, int]:
        return (low % divisor, high % divisor) if low // divisor == high // divisor else (0, divisor - 1)


EVERYWHERE = Everywhere()
