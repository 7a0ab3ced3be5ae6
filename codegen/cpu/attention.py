"""Sparse attention on a CPU: `sptc::sparse_attention` and its backward as BLAS products over gathered key blocks.

The work is cut into chunks of block lists (some heads with all their tiles, or some tiles of one head) whose buffers stay in the cache.
There is no loop over tokens. All arithmetic is fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sptc.codegen.block_lists import block_count
from sptc.codegen.cpu.mask import CpuMask, Lists, rows_of
from sptc.codegen.cpu.parallel import share, worker_count
from sptc.codegen.random import keep_runs

_CHUNK = 1 << 20  # elements of scores and gathered blocks at a time
_TINY = torch.finfo(torch.float32).tiny


def default_blocks(n: int, m: int, density: float, own: bool = False) -> tuple[int, int]:
    """(query_block, key_block) for n queries and m keys on a CPU.

    Small tiles choose better, large ones gather less and suit BLAS, so tiles grow with the number of kept keys L. A tile that owns blocks
    (`own`) gets at most half of L for them, so that it has a choice left; others are not smaller than BLAS likes.
    """
    kept = max(1, math.ceil(density * m))
    half = 1 << max(0, (kept // 2).bit_length() - 1)  # the greatest power of two in L / 2
    query_block = min(max(half, 16 if own else 64), 512)
    key_block = min(max(half // 2 if own else half, 8), 32)
    return min(query_block, max(n, 1)), min(key_block, max(m, 1))


@dataclass(frozen=True)
class Call:
    """What forward and backward share."""

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    counts: Tensor
    mask: CpuMask
    seed: Tensor | None
    dropout_p: float
    scale: float
    empty_rows: bool = True  # False if every row is known to have a key

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def keep_scale(self) -> float:
        return 0.0 if self.dropout_p == 1.0 else 1.0 / (1.0 - self.dropout_p)

    @functools.cached_property
    def key_bias(self) -> Tensor | None:
        """[1 or b, 1 or h_kv, blocks * key_block], -inf for masked keys and those past the end; None if all keys count."""
        bias, past = self.mask.key_bias(self.dtype), -self.mask.m % self.mask.key_block
        if bias is None and past:
            bias = torch.zeros((1, 1, self.mask.m), dtype=self.dtype)
        return torch.nn.functional.pad(bias, (0, past), value=-math.inf) if bias is not None and past else bias


@dataclass(frozen=True)
class Buffers:
    """Memory that chunks use one after another: fresh memory for each would cost more page faults than arithmetic."""

    dtype: torch.dtype
    held: dict[str, Tensor] = field(default_factory=dict)
    views: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> Tensor:
        """The memory called `name` as a contiguous tensor of this shape, with whatever was in it."""
        view = self.views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            if name not in self.held or self.held[name].numel() < size:
                self.held[name] = torch.empty(size, dtype=self.dtype)
                for key in [key for key in self.views if key[0] == name]:
                    del self.views[key]
            view = self.views[name, shape] = self.held[name][:size].view(shape)
        return view


@dataclass(frozen=True)
class Part:
    """A piece of work for one thread: some key heads of one batch row, or all of several rows. count = batch rows * key heads."""

    batches: slice
    heads: slice
    k: Tensor  # [count * blocks, key_block * d], contiguous in the dtype of arithmetic
    v: Tensor  # [count * blocks, key_block * d_v]
    ids: Tensor  # int64 [count, tiles, list width]
    unused: Tensor  # bool [count, tiles, list width]: slots after the end of a list
    bias: Tensor | None  # [count * blocks, key_block]

    @property
    def count(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class Chunk:
    """Lists with their queries and gathered keys: lists = count * tiles, rows = group * query_block, width = list width * key_block."""

    part: Part
    tile: int
    tiles: int
    place: Tensor  # int64 [lists * list width]: rows of part.k and part.v
    q: Tensor  # [lists, rows, d], zero past the end
    k: Tensor  # [lists, width, d]
    v: Tensor  # [lists, width, d_v]
    scores: Tensor  # [lists, rows, width], -inf where masked
    weights: Tensor  # [lists, rows, width]: softmax of the scores before dropout, 0 in rows without keys
    keep: Tensor | None  # bool [lists, rows, width]: what dropout keeps

    @property
    def where(self) -> tuple[Part, int, int]:
        return self.part, self.tile, self.tiles


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [b, h, n, d_v] in the dtype of q, lse [b, h, n] in the dtype of arithmetic."""
    mask = call.mask
    out = call.q.new_empty((mask.b, mask.h, mask.n, call.v.shape[-1]))
    lse = torch.empty((mask.b, mask.h, mask.n), dtype=call.dtype)

    def work(spans: Iterator[tuple[slice, slice]]) -> None:
        buffers = Buffers(call.dtype)
        for batches, heads in spans:
            for chunk in _chunks(call, _part(call, batches, heads, buffers), buffers):
                _chunk_forward(call, chunk, out, lse, buffers)

    share(_spans(call), work)
    return out, lse


def backward(call: Call, grad_out: Tensor, lse: Tensor, need: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, those without need as empty tensors of shape [0].

    The weights are computed anew, by softmax as in forward: on a CPU that is faster than exp(scores - lse).
    """
    call = dataclasses.replace(call, empty_rows=bool((lse == -math.inf).any()))
    grad_q, grad_k, grad_v = (
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype) for x, wanted in zip((call.q, call.k, call.v), need, strict=True)
    )

    def work(spans: Iterator[tuple[slice, slice]]) -> None:
        buffers = Buffers(call.dtype)
        for batches, heads in spans:
            part = _part(call, batches, heads, buffers)
            sums = _totals(call.mask, grad_k, part, "grad_k", buffers), _totals(call.mask, grad_v, part, "grad_v", buffers)
            for chunk in _chunks(call, part, buffers):
                _chunk_backward(call, chunk, grad_out, need, grad_q, sums, buffers)
            for grad, total, wanted in zip((grad_k, grad_v), sums, need[1:], strict=True):
                if wanted and (target := grad[batches, heads]).data_ptr() != total.data_ptr():
                    target.copy_(total.view(*target.shape[:2], -1, grad.shape[-1])[:, :, : call.mask.m])

    share(_spans(call), work)
    return grad_q, grad_k, grad_v


def _chunk_forward(call: Call, chunk: Chunk, out: Tensor, lse: Tensor, buffers: Buffers) -> None:
    with _stored(call.mask, *chunk.where, lse.unsqueeze(-1), buffers) as target:
        # The greatest weight is exp(greatest score - lse); rows without keys have weights 0 and scores -inf.
        torch.sub(chunk.scores.amax(-1), chunk.weights.amax(-1).clamp_(min=_TINY).log_(), out=target.squeeze(-1))
    weights = chunk.weights if chunk.keep is None else chunk.weights.mul_(chunk.keep).mul_(call.keep_scale)
    with _stored(call.mask, *chunk.where, out, buffers) as target:
        torch.bmm(weights, chunk.v, out=target)


def _chunk_backward(
    call: Call, chunk: Chunk, grad_out: Tensor, need: Sequence[bool], grad_q: Tensor, sums: Sequence[Tensor], buffers: Buffers
) -> None:
    mask, weights = call.mask, chunk.weights
    gradient = _load(mask, *chunk.where, grad_out, buffers, "grad_out")
    if need[2]:
        dropped = weights if chunk.keep is None else weights * chunk.keep * call.keep_scale
        _scatter(sums[1], chunk, torch.bmm(dropped.mT, gradient, out=buffers.take("gathered", *chunk.v.shape)))
    if not (need[0] or need[1]):
        return
    slope = torch.bmm(gradient, chunk.v.mT, out=buffers.take("slope", *weights.shape))
    if chunk.keep is not None:
        slope.mul_(chunk.keep).mul_(call.keep_scale)
    # In place: each row is summed before it is written.
    torch.ops.aten._softmax_backward_data.out(slope, weights, -1, slope.dtype, grad_input=slope)
    if need[0]:
        with _stored(mask, *chunk.where, grad_q, buffers) as target:
            _product(slope, chunk.k, call.scale, target)
    if need[1]:
        _scatter(sums[0], chunk, _product(slope.mT, chunk.q, call.scale, buffers.take("gathered", *chunk.k.shape)))


def _spans(call: Call) -> Iterator[tuple[slice, slice]]:
    """Batch rows and key heads, as many at a time as make a chunk and leave work for every thread."""
    mask = call.mask
    count = max(1, min(mask.b * mask.h_kv // worker_count(), _CHUNK // (call.ids.shape[2] * _list_elements(call))))
    batches, heads = max(1, count // mask.h_kv), min(count, mask.h_kv)
    for batch in range(0, mask.b, batches):
        for head in range(0, mask.h_kv, heads):
            yield slice(batch, min(batch + batches, mask.b)), slice(head, min(head + heads, mask.h_kv))


def _list_elements(call: Call) -> int:
    """Elements of scores and of gathered keys and values that one list needs."""
    width = call.ids.shape[-1] * call.mask.key_block
    return max(1, width * (call.mask.group * call.mask.query_block + call.q.shape[-1] + call.v.shape[-1]))


def _part(call: Call, batches: slice, heads: slice, buffers: Buffers) -> Part:
    mask, bias = call.mask, call.key_bias
    k, v = _packed(mask, call.k[batches, heads], "keys", buffers), _packed(mask, call.v[batches, heads], "values", buffers)
    if bias is not None:
        bias = rows_of(bias, batches, heads).reshape(-1, mask.key_block)
    ids = call.ids[batches, heads].flatten(0, 1).long()
    unused = torch.arange(ids.shape[-1]) >= call.counts[batches, heads].flatten(0, 1).unsqueeze(-1)
    return Part(batches, heads, k, v, ids, unused, bias)


def _chunks(call: Call, part: Part, buffers: Buffers) -> Iterator[Chunk]:
    """The lists of a part, as many tiles at a time as make a chunk."""
    tiles = call.ids.shape[2]
    step = max(1, min(tiles, _CHUNK // (part.count * _list_elements(call))))
    for tile in range(0, tiles, step):
        yield _chunk(call, part, tile, min(step, tiles - tile), buffers)


def _chunk(call: Call, part: Part, tile: int, tiles: int, buffers: Buffers) -> Chunk:
    mask, width = call.mask, call.ids.shape[-1]
    lists, rows, columns = part.count * tiles, mask.group * mask.query_block, width * mask.key_block
    ids, unused = part.ids[:, tile : tile + tiles], part.unused[:, tile : tile + tiles]
    blocks = int(block_count(mask.m, mask.key_block))
    place = (ids + torch.arange(0, part.count * blocks, blocks).view(-1, 1, 1)).view(-1)
    k = torch.index_select(part.k, 0, place, out=buffers.take("chunk_k", len(place), part.k.shape[1])).view(lists, columns, -1)
    v = torch.index_select(part.v, 0, place, out=buffers.take("chunk_v", len(place), part.v.shape[1])).view(lists, columns, -1)
    q = _load(mask, part, tile, tiles, call.q, buffers, "chunk_q")

    bias = None if part.bias is None else part.bias.index_select(0, place)
    if bool(unused.any()):
        bias = torch.zeros((len(place), mask.key_block), dtype=call.dtype) if bias is None else bias
        bias.masked_fill_(unused.reshape(-1, 1), -math.inf)
    row = None if bias is None else bias.view(lists, 1, columns)
    scores = _product(q, k.mT, call.scale, buffers.take("scores", lists, rows, columns), row)
    lists_of_chunk = Lists(part.batches, part.heads, tile, ids)
    if mask.hides_elements:
        mask.add_elements(scores.view(part.count, tiles, mask.group, mask.query_block, width, mask.key_block), lists_of_chunk)
    weights = torch.softmax(scores, -1, out=buffers.take("weights", *scores.shape))
    if call.empty_rows and (bias is not None or mask.hides_elements):
        empty = weights[..., :1].isnan()  # softmax of nothing but -inf
        if bool(empty.any()):
            weights.masked_fill_(empty & (scores.amax(-1, keepdim=True) == -math.inf), 0.0)
    return Chunk(part, tile, tiles, place, q, k, v, scores, weights, _survivors(call, lists_of_chunk))


def _survivors(call: Call, lists: Lists) -> Tensor | None:
    """bool [lists, rows, width]: what dropout keeps, or None without dropout."""
    if call.seed is None or call.dropout_p == 0.0:
        return None
    mask = call.mask
    count, tiles, width = lists.ids.shape
    b = torch.arange(lists.batches.start, lists.batches.stop).view(-1, 1)
    h = torch.arange(lists.heads.start * mask.group, lists.heads.stop * mask.group)
    q = torch.arange(lists.tile * mask.query_block, (lists.tile + tiles) * mask.query_block).view(1, tiles, 1, -1, 1)
    k = (lists.ids * mask.key_block).view(count, tiles, 1, 1, width)
    start = ((b * mask.h + h).view(count, 1, mask.group, 1, 1) * mask.n + q) * mask.m + k
    return keep_runs(call.seed, start, mask.key_block, call.dropout_p).view(count * tiles, -1, width * mask.key_block)


def _packed(mask: CpuMask, x: Tensor, name: str, buffers: Buffers) -> Tensor:
    """[batch rows, key heads, m, d] -> [count * blocks, key_block * d], zeros past the end; a view where the memory fits already."""
    batches, heads, m, d = x.shape
    length = int(block_count(m, mask.key_block)) * mask.key_block
    if length == m and x.dtype == buffers.dtype and x.is_contiguous():
        return x.view(-1, mask.key_block * d)
    packed = buffers.take(name, batches, heads, length, d)
    if length == m:
        packed.copy_(x)
    else:
        packed[:, :, :m] = x
        packed[:, :, m:] = 0.0
    return packed.view(-1, mask.key_block * d)


def _totals(mask: CpuMask, grad: Tensor, part: Part, name: str, buffers: Buffers) -> Tensor:
    """Zeros [count * blocks, key_block * d] to add up a gradient in: its own memory where that fits. Empty if it is not wanted."""
    if grad.dim() == 1:
        return grad
    columns = mask.key_block * grad.shape[-1]
    if mask.m % mask.key_block == 0 and grad.dtype == buffers.dtype:
        return grad[part.batches, part.heads].view(-1, columns).zero_()
    return buffers.take(name, part.count * int(block_count(mask.m, mask.key_block)), columns).zero_()


def _load(mask: CpuMask, part: Part, tile: int, tiles: int, x: Tensor, buffers: Buffers, name: str) -> Tensor:
    """Rows of x [b, h, n, d] that belong to a chunk: [count * tiles, group * query_block, d], zeros past the end; a view if memory fits."""
    rows = _rows(mask, part, tile, tiles, x)
    if _fits(rows, mask, tiles, buffers.dtype):
        return rows.reshape(part.count * tiles, mask.query_block, -1)
    tiled = _tiled(mask, rows, tiles, buffers, name)
    whole = rows.shape[3] // mask.query_block
    if whole == tiles:
        tiled.copy_(rows.unflatten(3, (whole, mask.query_block)))
    else:
        full, rest = whole * mask.query_block, rows.shape[3] - whole * mask.query_block
        tiled[:, :, :, :whole] = rows[:, :, :, :full].unflatten(3, (whole, mask.query_block))
        tiled[:, :, :, whole, :rest] = rows[:, :, :, full:]
        tiled[:, :, :, whole, rest:] = 0.0
    return buffers.take(name, part.count * tiles, mask.group * mask.query_block, x.shape[-1])


@contextlib.contextmanager
def _stored(mask: CpuMask, part: Part, tile: int, tiles: int, x: Tensor, buffers: Buffers) -> Iterator[Tensor]:
    """Memory [count * tiles, group * query_block, d] to fill; afterwards it is in the rows of x [b, h, n, d] that belong to a chunk."""
    rows = _rows(mask, part, tile, tiles, x)
    if _fits(rows, mask, tiles, buffers.dtype):
        yield rows.reshape(part.count * tiles, mask.query_block, -1)
        return
    yield buffers.take("stored", part.count * tiles, mask.group * mask.query_block, x.shape[-1])
    tiled = _tiled(mask, rows, tiles, buffers, "stored")
    whole = rows.shape[3] // mask.query_block
    full = whole * mask.query_block
    rows[:, :, :, :full].unflatten(3, (whole, mask.query_block)).copy_(tiled[:, :, :, :whole])
    if whole < tiles:
        rows[:, :, :, full:] = tiled[:, :, :, whole, : rows.shape[3] - full]


def _rows(mask: CpuMask, part: Part, tile: int, tiles: int, x: Tensor) -> Tensor:
    """The view [batch rows, key heads, group, rows, d] of x [b, h, n, d] that a chunk covers."""
    heads = slice(part.heads.start * mask.group, part.heads.stop * mask.group)
    rows = x[part.batches, heads, tile * mask.query_block : (tile + tiles) * mask.query_block]
    return rows.unflatten(1, (-1, mask.group))


def _fits(rows: Tensor, mask: CpuMask, tiles: int, dtype: torch.dtype) -> bool:
    """Whether the memory of `_rows` is that of the lists of a chunk."""
    return mask.group == 1 and rows.shape[3] == tiles * mask.query_block and rows.dtype == dtype and rows.is_contiguous()


def _tiled(mask: CpuMask, rows: Tensor, tiles: int, buffers: Buffers, name: str) -> Tensor:
    """The memory `name` of lists, seen as [batch rows, key heads, group, tiles, query_block, d]."""
    batches, heads, group, _, d = rows.shape
    return buffers.take(name, batches, heads, tiles, group, mask.query_block, d).transpose(2, 3)


def _product(a: Tensor, b: Tensor, alpha: float, out: Tensor, row: Tensor | None = None) -> Tensor:
    """alpha * a @ b + row, into `out`."""
    if row is None:
        return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)
    return torch.baddbmm(row.expand(out.shape), a, b, alpha=alpha, out=out)


def _scatter(total: Tensor, chunk: Chunk, values: Tensor) -> None:
    """Add values [lists, width, d] to the blocks they were gathered from."""
    total.index_add_(0, chunk.place, values.view(len(chunk.place), -1))
