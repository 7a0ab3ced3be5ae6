"""Selection of key blocks on a CPU: `sptc::select_blocks`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sptc.codegen.block_lists import block_count, list_width, lists_from_scores, nearest_first, owned, statistics_stride
from sptc.codegen.cpu.mask import CpuMask
from sptc.codegen.cpu.parallel import share, worker_count

_CHUNK = 1 << 19  # elements of similarities at a time, which stay in the cache


def select_blocks(
    q: Tensor, k: Tensor, codebooks: Tensor | None, mask: CpuMask, selector: str, density: float, scale: float, own: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `docs/architecture.md`. Scores are computed in fp32."""
    n, m, query_block, key_block = mask.n, mask.m, mask.query_block, mask.key_block
    allowed, visible = mask.allowed_pairs(), mask.visible_keys()
    sums, code_counts = None, None
    if selector == "pq":
        assert codebooks is not None
        books = _Codebooks.of(codebooks, statistics)
        scores = books.agreements(q, k, visible, query_block, key_block)
        sums, code_counts = books.sums, books.counts
    else:
        scores = _pooled(q, k, visible, allowed, scale, query_block, key_block)
    must = owned(n, m, query_block, key_block, q.device) if own and query_block > 1 else None
    width = int(list_width(n, m, density, query_block, key_block, own))
    ids, counts = lists_from_scores(scores, allowed, must, nearest_first(n, m, query_block, key_block, q.device), width)
    return ids, counts, torch.empty(0) if sums is None else sums, torch.empty(0) if code_counts is None else code_counts


@dataclass(frozen=True)
class _Codebooks:
    """Codebooks [h_kv, M, E, d / M] in fp32 and their statistics, which encoding adds to."""

    words: Tensor
    offset: Tensor  # [h_kv, M, E]: -|c|^2 / 2, so that the nearest codeword c of x has the greatest x.c + offset
    sums: Tensor | None  # [h_kv, M, E, d / M]; None if no statistics are asked for
    counts: Tensor | None  # [h_kv, M, E]

    @classmethod
    def of(cls, codebooks: Tensor, statistics: bool) -> _Codebooks:
        words = codebooks.float()
        sums, counts = (torch.zeros(words.shape), torch.zeros(words.shape[:3])) if statistics else (None, None)
        return cls(words, words.square().sum(-1).mul_(-0.5), sums, counts)

    def agreements(self, q: Tensor, k: Tensor, visible: Tensor | None, query_block: int, key_block: int) -> Tensor:
        """Number of (query, key, subspace) agreements of each tile and block: fp32 [b, h_kv, tiles, blocks].

        visible: bool [1 or b, 1 or h_kv, m], keys that count; None for all.
        """
        (b, h_kv, m, _), n = k.shape, q.shape[2]
        scores = torch.empty((b, h_kv, int(block_count(n, query_block)), int(block_count(m, key_block))))
        similarities = self.offset[0].numel() * max(n, m)  # of one head
        step = max(1, min(-(-h_kv // worker_count()), _CHUNK // similarities))

        q_stride, k_stride = statistics_stride(b, n), statistics_stride(b, m)

        def work(parts: Iterator[slice]) -> None:
            buffers = torch.empty((2, step * similarities))
            for heads in parts:
                for batch in range(b):
                    hidden = None if visible is None else _of(visible, batch).expand(h_kv, m)[heads].logical_not()
                    keys = self._encode(k[batch, heads], heads, hidden, key_block, k_stride, buffers)
                    members = q[batch].unflatten(0, (h_kv, -1))[heads].unbind(1)
                    queries = functools.reduce(torch.add, [self._encode(x, heads, None, query_block, q_stride, buffers) for x in members])
                    scores[batch, heads] = queries.mT @ keys

        # One worker takes all rows of a head, so that statistics add up in one order.
        share([slice(head, min(head + step, h_kv)) for head in range(0, h_kv, step)], work)
        return scores

    def _encode(self, x: Tensor, heads: slice, hidden: Tensor | None, step: int, stride: int, buffers: Tensor) -> Tensor:
        """Histograms [heads, M * E, runs] of x [heads, rows, d], without hidden rows (bool [heads, rows]); statistics of each stride-th."""
        (count, rows, _), (_, subspaces, codewords, size) = x.shape, self.words.shape
        parts = x.float().transpose(0, 1).reshape(rows, count * subspaces, size)
        shape = (count * subspaces, codewords, rows)
        similarity, hot = (buffer[: shape[0] * codewords * rows].view(shape) for buffer in buffers)
        offset = self.offset[heads].reshape(-1, codewords, 1).expand(shape)
        torch.baddbmm(offset, self.words[heads].reshape(-1, codewords, size), parts.permute(1, 2, 0), out=similarity)
        best = similarity.amax(1, keepdim=True)
        marks = shape[0] * rows
        if hidden is not None:
            best.view(count, subspaces, rows).masked_fill_(hidden.unsqueeze(1), math.inf)
            marks -= subspaces * int(hidden.sum())
        # Marking what equals the maximum is several times faster than argmax, and wrong only where two codewords are equally near.
        torch.eq(similarity, best, out=hot)
        found = _run_sums(hot, step)
        if int(found.sum(dtype=torch.float64)) > marks:
            _keep_first_mark(hot)
            found = _run_sums(hot, step)
        if self.sums is not None and self.counts is not None:
            sample = hot[..., ::stride].contiguous()
            self.sums[heads] += torch.bmm(sample, parts[::stride].transpose(0, 1)).view_as(self.sums[heads])
            self.counts[heads] += sample.sum(-1).view_as(self.counts[heads])
        return found.view(count, subspaces * codewords, -1)


def _keep_first_mark(hot: Tensor) -> None:
    """Of several ones along axis 1, keep the first. hot [sub-spaces, codewords, rows]."""
    subspace, row = (hot.sum(1) > 1).nonzero(as_tuple=True)
    marks = hot[subspace, :, row]
    hot[subspace, :, row] = torch.zeros_like(marks).scatter_(1, marks.argmax(1, keepdim=True), 1.0)


def _run_sums(x: Tensor, step: int) -> Tensor:
    """Sums over runs of `step` along the last axis; the last run may be shorter."""
    length = x.shape[-1]
    whole = length // step * step
    sums = x[..., :whole].unflatten(-1, (-1, step)).sum(-1) if whole else x[..., :0]
    return sums if whole == length else torch.cat((sums, x[..., whole:].sum(-1, keepdim=True)), -1)


def _pooled(q: Tensor, k: Tensor, visible: Tensor | None, allowed: Tensor, scale: float, query_block: int, key_block: int) -> Tensor:
    """Softmax of queries against block means of visible keys, summed over each tile: fp32 [b, h_kv, tiles, blocks]."""
    (b, h_kv, m, _), n = k.shape, q.shape[2]
    scores = torch.zeros((b, h_kv, int(block_count(n, query_block)), int(block_count(m, key_block))))

    def work(parts: Iterator[tuple[int, int]]) -> None:
        for batch, head in parts:
            shown = torch.ones((m, 1)) if visible is None else _of(_of(visible, batch), head).float().unsqueeze(-1)
            means = _by_run(k[batch, head].float() * shown, key_block).sum(1) / _by_run(shown, key_block).sum(1).clamp(min=1)
            hidden = ~_of(_of(allowed, batch), head).unsqueeze(1)  # [tiles, 1, blocks]
            for member in q[batch].unflatten(0, (h_kv, -1))[head]:
                logits = _by_run(torch.mm(member.float(), means.T).mul_(scale), query_block)
                weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
                if n % query_block:
                    weights[-1, n % query_block :] = 0.0
                scores[batch, head] += weights.sum(1)

    share([(batch, head) for batch in range(b) for head in range(h_kv)], work)
    return scores.nan_to_num_(0.0)


def _of(x: Tensor, index: int) -> Tensor:
    """x[index], where an axis of size 1 stands for all."""
    return x[index if x.shape[0] > 1 else 0]


def _by_run(x: Tensor, step: int) -> Tensor:
    """[length, c] -> [runs, step, c], zeros at the end."""
    return pad(x, (0, 0, 0, -x.shape[0] % step)).unflatten(0, (-1, step))
