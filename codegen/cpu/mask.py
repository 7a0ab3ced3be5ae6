"""The mask operands of sparse attention, split by what they cost on a CPU.

An operand that looks at keys only (padding) becomes a row added to the scores. One that looks at queries too is first judged for whole
(tile, block) pairs by interval arithmetic; its elements are computed only where some pair is not certain.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sptc.codegen.reference.block_lists import block_count
from sptc.ir.intervals import Ranges
from sptc.ir.predicate import Predicate, conjunction

_ELEMENTS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class CpuMask:
    """Mask operands of one call, with the sizes of the call. `boolean` and `bias` are None or broadcastable to [b, h, n, m]."""

    predicate: Predicate
    tensors: Sequence[Tensor]
    sizes: Sequence[int]
    boolean: Tensor | None
    bias: Tensor | None
    b: int
    h: int
    h_kv: int
    n: int
    m: int
    query_block: int
    key_block: int

    @property
    def group(self) -> int:
        return self.h // self.h_kv

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """All operands that look at keys only, as one row to add: [1 or b, 1 or h_kv, m], -inf where masked. None if there are none."""
        rows = [_minus_infinity(self._at_keys(c), dtype) for c in self.predicate.conjuncts if not self._by_element(c)]
        if self.boolean is not None and self._key_only(self.boolean):
            rows.append(_minus_infinity(_four(self.boolean)[:, :, 0], dtype))
        if self.bias is not None and self._key_only(self.bias):
            row = _four(self.bias)[:, :, 0]
            rows.append(row.to(dtype).masked_fill(~_shown(row), -math.inf))
        if not rows:
            return None
        row = functools.reduce(torch.add, rows)
        return row.expand(*row.shape[:2], self.m)

    def visible_keys(self) -> Tensor | None:
        """bool [1 or b, 1 or h_kv, m]: keys that no operand hides, on its own, from every query. None if every key is visible."""
        rows = [self._at_keys(c) for c in self.predicate.conjuncts if not c.uses("q")]
        rows += [_four(operand).any(2) for operand in self._tensor_operands()]
        if not rows:
            return None
        row = functools.reduce(operator.and_, rows)
        row = row.expand(*row.shape[:2], self.m)
        return self._any_of_group(row)

    def allowed_pairs(self) -> Tensor:
        """bool [1 or b, 1 or h_kv, tiles, blocks]: some query of the tile may see some key of the block. Exact."""
        possible = torch.ones((1, 1, 1, 1), dtype=torch.bool)
        undecided = torch.zeros((1, 1, 1, 1), dtype=torch.int8)
        for some, every, tight in self._pair_bounds():
            possible = possible & some
            undecided = undecided + (some & ~every).to(torch.int8) * (1 if tight else 2)
        # One exact operand decides alone; two undecided ones may hold at different elements, so the elements must be looked at.
        possible = possible.expand(*torch.broadcast_shapes(possible.shape, self._pair_shape()))
        unsure = (possible & (undecided > 1)).nonzero()
        if len(unsure):
            possible = possible.clone()
            step = max(1, _ELEMENTS_AT_A_TIME // (self.query_block * self.key_block))
            for part in unsure.split(step):
                possible[tuple(part.T)] = self._any_element(part)
        return self._any_of_group(possible)

    @property
    def element_predicate(self) -> Predicate | None:
        """The conjuncts that `key_bias` leaves out."""
        return conjunction(self._element_conjuncts) if self._element_conjuncts else None

    @property
    def element_boolean(self) -> Tensor | None:
        """`boolean` as [1 or b, 1 or h, 1 or n, 1 or m], where `key_bias` leaves it out."""
        return None if self.boolean is None or self._key_only(self.boolean) else _four(self.boolean)

    def element_bias(self, dtype: torch.dtype) -> Tensor | None:
        """`bias` likewise, -inf where it masks."""
        if self.bias is None or self._key_only(self.bias):
            return None
        bias = _four(self.bias)
        return bias.to(dtype).masked_fill(~_shown(bias), -math.inf)

    def certain_pairs(self) -> Tensor | None:
        """bool [1 or b, 1 or h_kv, tiles, blocks]: `element_predicate` holds everywhere. None if that is not worth asking."""
        if not self._element_conjuncts or self.query_block * self.key_block < 16:
            return None
        every = (c.bounds(self._ranges(c), self.tensors, self.sizes)[1] for c in self._element_conjuncts)
        pairs = functools.reduce(operator.and_, every)
        pairs = pairs.expand(torch.broadcast_shapes(pairs.shape, self._pair_shape()))
        return pairs if pairs.shape[1] == 1 else pairs.unflatten(1, (self.h_kv, self.group)).all(2)

    @functools.cached_property
    def _element_conjuncts(self) -> tuple[Predicate, ...]:
        return tuple(c for c in self.predicate.conjuncts if self._by_element(c))

    def _by_element(self, conjunct: Predicate) -> bool:
        return conjunct.uses("q") or (conjunct.uses("h") and self.group > 1)

    def _key_only(self, x: Tensor) -> bool:
        x = _four(x)
        return (x.shape[2] == 1 or x.stride(2) == 0) and (x.shape[1] == 1 or self.group == 1)

    def _tensor_operands(self) -> list[Tensor]:
        found = [] if self.boolean is None else [_four(self.boolean)]
        return found if self.bias is None else [*found, _shown(_four(self.bias))]

    def _pair_shape(self) -> tuple[int, int, int, int]:
        return 1, 1, int(block_count(self.n, self.query_block)), int(block_count(self.m, self.key_block))

    def _any_of_group(self, x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x.unflatten(1, (self.h_kv, self.group)).any(2)

    def _at_keys(self, conjunct: Predicate) -> Tensor:
        """The value of a conjunct that does not look at q: bool [1 or b, 1 or h, 1 or m]."""
        b, h = self._batch_and_heads(conjunct, dims=3)
        value = conjunct.evaluate(b, h, torch.zeros(()), torch.arange(self.m), self.tensors, self.sizes)
        return value.expand(torch.broadcast_shapes(value.shape, (1, 1, 1)))

    def _batch_and_heads(self, conjunct: Predicate, dims: int) -> tuple[Tensor, Tensor]:
        b = torch.arange(self.b if conjunct.uses("b") else 1).view(-1, *[1] * (dims - 1))
        return b, torch.arange(self.h if conjunct.uses("h") else 1).view(1, -1, *[1] * (dims - 2))

    def _ranges(self, conjunct: Predicate) -> Ranges:
        b, h = self._batch_and_heads(conjunct, dims=4)
        _, _, tiles, blocks = self._pair_shape()
        return Ranges(b, h, torch.arange(tiles).unsqueeze(1), torch.arange(blocks), self.query_block, self.key_block, self.n, self.m)

    def _pair_bounds(self) -> list[tuple[Tensor, Tensor, bool]]:
        """(possible, certain, tight) of every operand; possible for each batch row and head that the operand looks at."""
        found = []
        for conjunct in self.predicate.conjuncts:
            ranges = self._ranges(conjunct)
            some, every = conjunct.bounds(ranges, self.tensors, self.sizes)
            # A bound may be the same for all rows where the elements, which are looked at next, are not.
            some = some.expand(torch.broadcast_shapes(some.shape, ranges.b.shape, ranges.h.shape))
            found.append((some, every, conjunct.tight))
        for operand in self._tensor_operands():
            some = _by_blocks(operand, self.query_block, self.key_block, False, Tensor.any)
            found.append((some, _by_blocks(operand, self.query_block, self.key_block, True, Tensor.all), True))
        return found

    def _any_element(self, pairs: Tensor) -> Tensor:
        """bool [pairs]: some element of the pair is allowed. pairs int64 [pairs, 4]: batch row, head, tile, block (0 stands for all)."""
        b, h, tile, block = (column.view(-1, 1, 1) for column in pairs.T)
        q = tile * self.query_block + torch.arange(self.query_block).view(1, -1, 1)
        k = block * self.key_block + torch.arange(self.key_block)
        keep = (q < self.n) & (k < self.m)
        q, k = q.clamp(max=self.n - 1), k.clamp(max=self.m - 1)
        for conjunct in self.predicate.conjuncts:
            keep = keep & conjunct.evaluate(b, h, q, k, self.tensors, self.sizes)
        for operand in self._tensor_operands():
            keep = keep & _picked(operand, (b, h, q, k))
        return keep.flatten(1).any(1)


def _four(x: Tensor) -> Tensor:
    """[.., .., n, m] with axes that were broadcast at size 1: nothing is worth computing for each of many copies."""
    x = x[(None,) * (4 - x.dim())]
    return x[tuple(slice(0, 1) if stride == 0 and size > 1 else slice(None) for size, stride in zip(x.shape, x.stride(), strict=True))]


def _shown(bias: Tensor) -> Tensor:
    return bias > torch.finfo(bias.dtype).min


def _minus_infinity(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype).masked_fill_(~keep, -math.inf)


def _picked(x: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Elements of x [1 or b, 1 or h, 1 or n, 1 or m] at positions that broadcast together."""
    return x[tuple(p if size > 1 else torch.zeros_like(p) for size, p in zip(x.shape, positions, strict=True))]


def _by_blocks(x: Tensor, query_block: int, key_block: int, fill: bool, reduce: Callable[..., Tensor]) -> Tensor:
    """bool [.., n, m] -> [.., tiles, blocks]; axes of size 1 keep it."""
    for axis, step in ((3, key_block), (2, query_block)):
        if x.shape[axis] > 1:
            x = x.transpose(axis, 3)
            x = reduce(pad(x, (0, -x.shape[3] % step), value=fill).unflatten(3, (-1, step)), -1).transpose(axis, 3)
    return x
