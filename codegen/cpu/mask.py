"""The mask operands of sparse attention, split by what they cost on a CPU.

An operand that looks at keys only (padding) becomes a row added to the scores. One that looks at queries too is first judged for whole
(tile, block) pairs by interval arithmetic; its elements are computed only where some pair is not certain.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sptc.codegen.block_lists import block_count
from sptc.predicate import Predicate, Ranges

_ELEMENTS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Rows:
    """Some (batch row, key head) pairs, each with the query heads of its group."""

    b: Tensor  # int64 [rows]
    h: Tensor  # int64 [rows, group]

    @classmethod
    def of(cls, batches: slice, heads: slice, group: int) -> Rows:
        h = torch.arange(heads.start * group, heads.stop * group).view(-1, group)
        b = torch.arange(batches.start, batches.stop).repeat_interleave(len(h))
        return cls(b, h.repeat(batches.stop - batches.start, 1))

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.b[part], self.h[part])


@dataclass(frozen=True)
class Open:
    """A run of tiles, with the range of list slots outside which the element conjuncts hold everywhere."""

    tiles: slice
    slots: slice
    limit: Tensor | None  # [1, tiles, 1, query_block, slots, key_block]: inf where they hold, else -inf; None if it differs between rows


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

    @functools.cached_property
    def hides_elements(self) -> bool:
        """Whether `add_elements` may change scores."""
        return bool(self._element_conjuncts) or self._element_boolean is not None or self._element_bias is not None

    def open_runs(self, rows: Rows, ids: Tensor) -> list[Open]:
        """Where the element conjuncts have to be looked at in the lists of `rows`, int64 [rows, tiles, width]."""
        if not self._element_conjuncts:
            return []
        by_batch = any(c.uses("b") for c in self._element_conjuncts)
        alike = not any(c.uses("h") for c in self._element_conjuncts) and (not by_batch or bool((rows.b == rows.b[0]).all()))
        found = []
        for tiles, slots in self._uncertain(rows, ids):
            part = ids[:, tiles, slots]
            if not alike or not bool((part == part[:1]).all()):
                found.append(Open(tiles, slots, None))
                continue
            # Blocks that all heads keep, such as a tile's own, are looked at once.
            key = (tiles.start, tiles.stop, int(rows.b[0]) if by_batch else 0)
            known = self._limits.get(key)
            if known is None or not torch.equal(known[0], part[0]):
                known = self._limits[key] = part[0].clone(), self._limit(rows[:1], tiles.start, part[:1])
            found.append(Open(tiles, slots, known[1]))
        return found

    def add_elements(self, scores: Tensor, rows: Rows, tile: int, ids: Tensor, runs: Sequence[Open]) -> None:
        """Add to scores [rows, tiles, group, query_block, width, key_block], in place, every operand that `key_bias` leaves out.

        ids int64 [rows, tiles, width] are the lists from `tile` on; `runs` are those of `open_runs` for all tiles.
        """
        for run in runs:
            start, stop = max(run.tiles.start, tile), min(run.tiles.stop, tile + scores.shape[1])
            if start >= stop:
                continue
            here = slice(start - tile, stop - tile)
            part = scores[:, here, :, :, run.slots]
            if run.limit is None:
                limit = self._limit(rows, start, ids[:, here, run.slots])
            else:
                limit = run.limit[:, start - run.tiles.start : stop - run.tiles.start]
            torch.minimum(part, limit.to(scores.dtype), out=part)
        if self._element_boolean is not None:
            scores.masked_fill_(_picked(self._element_boolean, self._positions(rows, tile, ids)).logical_not(), -math.inf)
        if self._element_bias is not None:
            bias = _picked(self._element_bias, self._positions(rows, tile, ids))
            scores.add_(bias).masked_fill_(~_shown(bias), -math.inf)

    def _limit(self, rows: Rows, tile: int, ids: Tensor) -> Tensor:
        """fp32 inf where the element conjuncts hold, else -inf; broadcastable to scores."""
        positions = self._positions(rows, tile, ids)
        keep = functools.reduce(operator.and_, (c.evaluate(*positions, self.tensors, self.sizes) for c in self._element_conjuncts))
        return torch.where(keep, math.inf, -math.inf)

    @functools.cached_property
    def _limits(self) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
        """By tiles and batch row: the blocks looked at last, and their `_limit`."""
        return {}

    @functools.cached_property
    def _element_conjuncts(self) -> tuple[Predicate, ...]:
        return tuple(c for c in self.predicate.conjuncts if self._by_element(c))

    @functools.cached_property
    def _element_boolean(self) -> Tensor | None:
        return None if self.boolean is None or self._key_only(self.boolean) else _four(self.boolean)

    @functools.cached_property
    def _element_bias(self) -> Tensor | None:
        return None if self.bias is None or self._key_only(self.bias) else _four(self.bias)

    @functools.cached_property
    def _certain_pairs(self) -> Tensor | None:
        """bool [1 or b, 1 or h_kv, tiles, blocks]: the element conjuncts hold everywhere. None if that was not worth asking."""
        if not self._element_conjuncts or self.query_block * self.key_block < 16:
            return None
        every = (c.bounds(self._ranges(c), self.tensors, self.sizes)[1] for c in self._element_conjuncts)
        pairs = functools.reduce(operator.and_, every)
        pairs = pairs.expand(torch.broadcast_shapes(pairs.shape, self._pair_shape()))
        return pairs if pairs.shape[1] == 1 else pairs.unflatten(1, (self.h_kv, self.group)).all(2)

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
        """(possible, certain, tight) of every operand."""
        found = [(*c.bounds(self._ranges(c), self.tensors, self.sizes), c.tight) for c in self.predicate.conjuncts]
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

    def _positions(self, rows: Rows, tile: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, h, q, k for scores [rows, tiles, group, query_block, width, key_block]; those past the end repeat the last."""
        count, tiles, width = ids.shape
        q = torch.arange(tile * self.query_block, (tile + tiles) * self.query_block).clamp_(max=self.n - 1)
        k = (ids.unsqueeze(-1) * self.key_block + torch.arange(self.key_block)).clamp_(max=self.m - 1)
        b, h = rows.b.view(count, 1, 1, 1, 1, 1), rows.h.view(count, 1, self.group, 1, 1, 1)
        return b, h, q.view(1, tiles, 1, -1, 1, 1), k.view(count, tiles, 1, 1, width, -1)

    def _uncertain(self, rows: Rows, ids: Tensor) -> Iterator[tuple[slice, slice]]:
        """Runs of tiles, each with the range of list slots outside which the element conjuncts hold everywhere."""
        _, tiles, width = ids.shape
        if self._certain_pairs is None:
            yield slice(0, tiles), slice(0, width)
            return
        pairs = rows_of(self._certain_pairs, rows, self.group)
        open_slots = pairs.gather(-1, ids).all(0).logical_not().to(torch.int8)  # [tiles, width]
        first, last = open_slots.argmax(-1).tolist(), (width - open_slots.flip(-1).argmax(-1)).tolist()
        spans = [(low, high) if some else None for low, high, some in zip(first, last, open_slots.any(-1).tolist(), strict=True)]
        start = 0
        for span, run in itertools.groupby(spans):
            stop = start + len(list(run))
            if span is not None:
                yield slice(start, stop), slice(*span)
            start = stop


def rows_of(x: Tensor, rows: Rows, group: int) -> Tensor:
    """[1 or b, 1 or h_kv, ...] -> [rows, ...]; an axis of size 1 stands for all."""
    b = rows.b if x.shape[0] > 1 else torch.zeros_like(rows.b)
    return x[b, rows.h[:, 0] // group if x.shape[1] > 1 else torch.zeros_like(b)]


def _four(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


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
