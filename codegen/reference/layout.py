"""How results of attention lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def empty_rows(like: Tensor, shape: Sequence[int]) -> Tensor:
    """[b, h, n, d] of the dtype and device of `like`, uninitialised, all heads of a position together: [b, n, h, d] in memory.

    Fused attention of torch lays its result out so too, and the projection that reads it, or a gradient, needs no copy.
    """
    b, h, n, d = shape
    return like.new_empty((b, n, h, d)).transpose(1, 2)
