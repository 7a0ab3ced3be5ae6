"""Sparse attention on a CPU: `sptc::sparse_attention` and its backward as BLAS products over gathered key blocks.

The work is cut into chunks of block lists (some heads with all their tiles, or some tiles of one head) whose buffers stay in the cache.
There is no loop over tokens. All arithmetic is fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sptc.codegen.block_lists import block_count
from sptc.codegen.cpu.mask import CpuMask, Open, Rows, rows_of
from sptc.codegen.cpu.parallel import share, worker_count
from sptc.codegen.random import keep_runs

_PART = 1 << 18  # elements of q, or of k, that a thread brings into place at a time
_CHUNK = 1 << 19  # elements of scores and gathered blocks that it then works on at a time: both stay in a core's cache


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

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def tiny(self) -> Tensor:
        return torch.tensor(torch.finfo(self.dtype).tiny, dtype=self.dtype)

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
    """A piece of work for one thread: some key heads of one batch row, or all of several rows. Lists are in order of row, then tile."""

    batches: slice
    heads: slice
    rows: Rows
    k: Tensor  # [rows * blocks, key_block * d], contiguous in the dtype of arithmetic
    v: Tensor  # [rows * blocks, key_block * d_v]
    q: Tensor  # [lists, group * query_block, d], zero past the end
    ids: Tensor  # int64 [rows, tiles, list width]
    place: Tensor  # int64 [lists, list width]: ids as numbers of rows of k and v
    bias: Tensor | None  # [lists, 1, list width * key_block]: key-only operands, and -inf in slots past the end of a list
    runs: list[Open]


@dataclass(frozen=True)
class Chunk:
    """Some lists of a part with their gathered keys: tiles [tile, tile + tiles) of rows `rows`. width = list width * key_block."""

    rows: slice
    tile: int
    tiles: int
    lists: slice
    place: Tensor  # int64 [lists * list width]: rows of part.k and part.v
    k: Tensor  # [lists, width, d]
    v: Tensor  # [lists, width, d_v]
    scores: Tensor  # [lists, group * query_block, width], -inf where masked
    weights: Tensor  # likewise: softmax of the scores, NaN in rows without keys
    keep: Tensor | None  # bool, likewise: what dropout keeps


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [b, h, n, d_v] in the dtype of q, lse [b, h, n] in the dtype of arithmetic."""
    mask = call.mask
    out = call.q.new_empty((mask.b, mask.h, mask.n, call.v.shape[-1]))
    lse = torch.empty((mask.b, mask.h, mask.n), dtype=call.dtype)

    def work(spans: Iterator[tuple[slice, slice]]) -> None:
        buffers = Buffers(call.dtype)
        for span in spans:
            part = _part(call, *span, buffers)
            with (
                _stored(mask, out[_query_heads(mask, span)], buffers, "out") as out_tiles,
                _stored(mask, lse[_query_heads(mask, span)].unsqueeze(-1), buffers, "lse") as lse_tiles,
            ):
                for chunk in _chunks(call, part, buffers):
                    _chunk_forward(call, chunk, out_tiles[chunk.lists], lse_tiles[chunk.lists])
                empty = lse_tiles == -math.inf
                if bool(empty.any()):
                    out_tiles.masked_fill_(empty, 0.0)

    share(_spans(call), work)
    return out, lse


def backward(call: Call, grad_out: Tensor, lse: Tensor, need: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, those without need as empty tensors of shape [0].

    The weights are computed anew, by softmax as in forward: on a CPU that is faster than exp(scores - lse).
    """
    mask, empty_rows = call.mask, bool((lse == -math.inf).any())
    grad_q, grad_k, grad_v = (
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype) for x, wanted in zip((call.q, call.k, call.v), need, strict=True)
    )

    def work(spans: Iterator[tuple[slice, slice]]) -> None:
        buffers = Buffers(call.dtype)
        for span in spans:
            part = _part(call, *span, buffers)
            grad_tiles = _load(mask, grad_out[_query_heads(mask, span)], buffers, "grad_out")
            empty = None
            if empty_rows:  # rows past the end count too, as zeros
                empty = _load(mask, (lse[_query_heads(mask, span)] > -math.inf).unsqueeze(-1), buffers, "filled") == 0.0
            sums = _totals(mask, grad_k, span, "grad_k", buffers), _totals(mask, grad_v, span, "grad_v", buffers)
            with _stored(mask, grad_q[_query_heads(mask, span)] if need[0] else None, buffers, "grad_q") as q_tiles:
                for chunk in _chunks(call, part, buffers):
                    if empty is not None:
                        chunk.weights.masked_fill_(empty[chunk.lists], 0.0)
                    _chunk_backward(call, part, chunk, grad_tiles[chunk.lists], need, q_tiles, sums, buffers)
            for grad, total, wanted in zip((grad_k, grad_v), sums, need[1:], strict=True):
                if wanted and (target := grad[span]).data_ptr() != total.data_ptr():
                    target.copy_(total.view(*target.shape[:2], -1, grad.shape[-1])[:, :, : mask.m])

    share(_spans(call), work)
    return grad_q, grad_k, grad_v


def _chunk_forward(call: Call, chunk: Chunk, out: Tensor, lse: Tensor) -> None:
    # The greatest weight is exp(greatest score - lse). In rows without keys it is NaN, which fmax drops, and the greatest score -inf.
    greatest = torch.fmax(chunk.weights.amax(-1, keepdim=True), call.tiny).log_()
    torch.sub(chunk.scores.amax(-1, keepdim=True), greatest, out=lse)
    weights = chunk.weights if chunk.keep is None else chunk.weights.mul_(chunk.keep).mul_(call.keep_scale)
    torch.bmm(weights, chunk.v, out=out)


def _chunk_backward(
    call: Call, part: Part, chunk: Chunk, grad_out: Tensor, need: Sequence[bool], grad_q: Tensor, sums: Sequence[Tensor], buffers: Buffers
) -> None:
    weights = chunk.weights
    if need[2]:
        dropped = weights if chunk.keep is None else weights * chunk.keep * call.keep_scale
        _scatter(sums[1], chunk, torch.bmm(dropped.mT, grad_out, out=buffers.take("gathered", *chunk.v.shape)))
    if not (need[0] or need[1]):
        return
    slope = torch.bmm(grad_out, chunk.v.mT, out=buffers.take("slope", *weights.shape))
    if chunk.keep is not None:
        slope.mul_(chunk.keep).mul_(call.keep_scale)
    # In place: each row is summed before it is written.
    torch.ops.aten._softmax_backward_data.out(slope, weights, -1, slope.dtype, grad_input=slope)
    if need[0]:
        _product(slope, chunk.k, call.scale, grad_q[chunk.lists])
    if need[1]:
        _scatter(sums[0], chunk, _product(slope.mT, part.q[chunk.lists], call.scale, buffers.take("gathered", *chunk.k.shape)))


def _spans(call: Call) -> Iterator[tuple[slice, slice]]:
    """Batch rows and key heads of the parts: small enough to leave work for every thread."""
    mask = call.mask
    of_a_head = max(mask.group * mask.n * call.q.shape[-1], mask.m * max(call.k.shape[-1], call.v.shape[-1]))
    count = max(1, min(mask.b * mask.h_kv // worker_count(), _PART // of_a_head))
    batches, heads = max(1, count // mask.h_kv), min(count, mask.h_kv)
    for batch in range(0, mask.b, batches):
        for head in range(0, mask.h_kv, heads):
            yield slice(batch, min(batch + batches, mask.b)), slice(head, min(head + heads, mask.h_kv))


def _query_heads(mask: CpuMask, span: tuple[slice, slice]) -> tuple[slice, slice]:
    batches, heads = span
    return batches, slice(heads.start * mask.group, heads.stop * mask.group)


def _part(call: Call, batches: slice, heads: slice, buffers: Buffers) -> Part:
    mask, rows = call.mask, Rows.of(batches, heads, call.mask.group)
    k, v = _packed(mask, call.k[batches, heads], "keys", buffers), _packed(mask, call.v[batches, heads], "values", buffers)
    q = _load(mask, call.q[_query_heads(mask, (batches, heads))], buffers, "queries")
    ids = call.ids[batches, heads].flatten(0, 1).long()
    blocks, width = int(block_count(mask.m, mask.key_block)), ids.shape[-1]
    place = (ids + torch.arange(0, len(ids) * blocks, blocks).view(-1, 1, 1)).view(-1, width)
    bias = call.key_bias
    if bias is not None:
        bias = rows_of(bias, rows, mask.group).view(-1, mask.key_block).index_select(0, place.view(-1))
    unused = torch.arange(width) >= call.counts[batches, heads].reshape(-1, 1)
    if bool(unused.any()):
        bias = torch.zeros((place.numel(), mask.key_block), dtype=call.dtype) if bias is None else bias
        bias.masked_fill_(unused.view(-1, 1), -math.inf)
    bias = None if bias is None else bias.view(len(place), 1, width * mask.key_block)
    return Part(batches, heads, rows, k, v, q, ids, place, bias, mask.open_runs(rows, ids))


def _chunks(call: Call, part: Part, buffers: Buffers) -> Iterator[Chunk]:
    """The lists of a part: some rows with all their tiles, or some tiles of one row."""
    count, tiles, width = part.ids.shape
    of_a_list = width * call.mask.key_block * (part.q.shape[1] + call.q.shape[-1] + call.v.shape[-1])
    lists = max(1, _CHUNK // max(1, of_a_list))
    row_step, tile_step = max(1, lists // tiles), min(lists, tiles)
    for row in range(0, count, row_step):
        for tile in range(0, tiles, tile_step):
            yield _chunk(call, part, slice(row, min(row + row_step, count)), tile, min(tile_step, tiles - tile), buffers)


def _chunk(call: Call, part: Part, rows: slice, tile: int, tiles: int, buffers: Buffers) -> Chunk:
    mask, (_, all_tiles, width) = call.mask, part.ids.shape
    count = (rows.stop - rows.start) * tiles
    lists = slice(rows.start * all_tiles + tile, rows.start * all_tiles + tile + count)
    place, columns = part.place[lists].view(-1), width * mask.key_block
    k = torch.index_select(part.k, 0, place, out=buffers.take("chunk_k", len(place), part.k.shape[1])).view(count, columns, -1)
    v = torch.index_select(part.v, 0, place, out=buffers.take("chunk_v", len(place), part.v.shape[1])).view(count, columns, -1)
    bias = None if part.bias is None else part.bias[lists]
    scores = _product(part.q[lists], k.mT, call.scale, buffers.take("scores", count, part.q.shape[1], columns), bias)
    ids, within = part.ids[rows, tile : tile + tiles], part.rows[rows]
    if mask.hides_elements:
        shaped = scores.view(rows.stop - rows.start, tiles, mask.group, mask.query_block, width, mask.key_block)
        mask.add_elements(shaped, within, tile, ids, part.runs)
    weights = torch.softmax(scores, -1, out=buffers.take("weights", *scores.shape))
    return Chunk(rows, tile, tiles, lists, place, k, v, scores, weights, _survivors(call, within, tile, ids))


def _survivors(call: Call, rows: Rows, tile: int, ids: Tensor) -> Tensor | None:
    """bool [lists, group * query_block, width]: what dropout keeps, or None without dropout."""
    if call.seed is None or call.dropout_p == 0.0:
        return None
    mask = call.mask
    count, tiles, width = ids.shape
    q = torch.arange(tile * mask.query_block, (tile + tiles) * mask.query_block).view(1, tiles, 1, -1, 1)
    k = (ids * mask.key_block).view(count, tiles, 1, 1, width)
    start = ((rows.b.view(-1, 1) * mask.h + rows.h).view(count, 1, mask.group, 1, 1) * mask.n + q) * mask.m + k
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


def _totals(mask: CpuMask, grad: Tensor, span: tuple[slice, slice], name: str, buffers: Buffers) -> Tensor:
    """Zeros [rows * blocks, key_block * d] to add up a gradient in: its own memory where that fits. Empty if it is not wanted."""
    if grad.dim() == 1:
        return grad
    target, columns = grad[span], mask.key_block * grad.shape[-1]
    if mask.m % mask.key_block == 0 and grad.dtype == buffers.dtype:
        return target.view(-1, columns).zero_()
    return buffers.take(name, target.shape[0] * target.shape[1] * int(block_count(mask.m, mask.key_block)), columns).zero_()


def _load(mask: CpuMask, x: Tensor, buffers: Buffers, name: str) -> Tensor:
    """x [batch rows, query heads, n, d] -> [lists, group * query_block, d], zeros past the end; a view where the memory fits already."""
    if _fits(mask, x, buffers.dtype):
        return x.view(-1, mask.query_block, x.shape[-1])
    whole = mask.n // mask.query_block
    lists, tiled = _tiled(mask, x, buffers, name)
    heads = x.unflatten(1, (-1, mask.group))
    full = whole * mask.query_block
    tiled[:, :, :, :whole].copy_(heads[:, :, :, :full].unflatten(3, (whole, mask.query_block)))
    if full < mask.n:
        tiled[:, :, :, whole, : mask.n - full] = heads[:, :, :, full:]
        tiled[:, :, :, whole, mask.n - full :] = 0.0
    return lists


@contextlib.contextmanager
def _stored(mask: CpuMask, x: Tensor | None, buffers: Buffers, name: str) -> Iterator[Tensor]:
    """Memory [lists, group * query_block, d] to fill; afterwards it is in x [batch rows, query heads, n, d]. Empty without x."""
    if x is None or _fits(mask, x, buffers.dtype):
        yield buffers.take(name, 0) if x is None else x.view(-1, mask.query_block, x.shape[-1])
        return
    lists, tiled = _tiled(mask, x, buffers, name)
    yield lists
    whole = mask.n // mask.query_block
    heads, full = x.unflatten(1, (-1, mask.group)), whole * mask.query_block
    heads[:, :, :, :full].unflatten(3, (whole, mask.query_block)).copy_(tiled[:, :, :, :whole])
    if full < mask.n:
        heads[:, :, :, full:] = tiled[:, :, :, whole, : mask.n - full]


def _fits(mask: CpuMask, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the memory of x [batch rows, query heads, n, d] is that of lists."""
    return mask.group == 1 and mask.n % mask.query_block == 0 and x.dtype == dtype and x.is_contiguous()


def _tiled(mask: CpuMask, x: Tensor, buffers: Buffers, name: str) -> tuple[Tensor, Tensor]:
    """The memory `name` as [lists, group * query_block, d], and as [batch rows, key heads, group, tiles, query_block, d]."""
    tiles = int(block_count(mask.n, mask.query_block))
    lists = buffers.take(name, x.shape[0] * x.shape[1] // mask.group * tiles, mask.group * mask.query_block, x.shape[-1])
    return lists, lists.view(x.shape[0], -1, tiles, mask.group, mask.query_block, x.shape[-1]).transpose(2, 3)


def _product(a: Tensor, b: Tensor, alpha: float, out: Tensor, row: Tensor | None = None) -> Tensor:
    """alpha * a @ b + row, into `out`."""
    if row is None:
        return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)
    return torch.baddbmm(row.expand(out.shape), a, b, alpha=alpha, out=out)


def _scatter(total: Tensor, chunk: Chunk, values: Tensor) -> None:
    """Add values [lists, width, d] to the blocks they were gathered from."""
    total.index_add_(0, chunk.place, values.view(len(chunk.place), -1))
