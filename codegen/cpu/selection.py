"""Selection of key blocks on a CPU: `sptc::select_blocks`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sptc.codegen.block_lists import block_count, list_width, lists_from_scores, nearest_first, owned, statistics_stride
from sptc.codegen.cpu.mask import CpuMask

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
        scores = books.histograms(q, query_block, None).mT @ books.histograms(k, key_block, visible)
        sums, code_counts = books.sums, books.counts
    else:
        scores = _pooled(q, k, visible, allowed, scale, query_block, key_block)
    must = owned(n, m, query_block, key_block, q.device) if own and query_block > 1 else None
    width = int(list_width(n, m, density, query_block, key_block, own))
    ids, counts = lists_from_scores(scores, allowed, must, nearest_first(n, m, query_block, key_block, q.device), width)
    return ids, counts, *(torch.empty(0) if x is None else x for x in (sums, code_counts))


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

    def histograms(self, x: Tensor, step: int, visible: Tensor | None) -> Tensor:
        """How often each codeword occurs in each run of `step` rows: x [b, h, rows, d] -> fp32 [b, h_kv, M * E, runs].

        visible: bool [1 or b, 1 or h_kv, rows], rows that count; None for all.
        """
        (b, _, rows, _), (h_kv, subspaces, codewords, _) = x.shape, self.words.shape
        found = torch.zeros((b, h_kv, subspaces * codewords, int(block_count(rows, step))))
        at_a_time = max(1, min(h_kv, _CHUNK // (subspaces * codewords * rows)))
        buffers = torch.empty((2, at_a_time * subspaces * codewords * rows))
        for batch in range(b):
            row = None if visible is None else visible[min(batch, visible.shape[0] - 1)].expand(h_kv, rows)
            for first in range(0, h_kv, at_a_time):
                heads = slice(first, min(first + at_a_time, h_kv))
                hidden = None if row is None else row[heads].logical_not()
                for member in x[batch].unflatten(0, (h_kv, -1))[heads].unbind(1):
                    found[batch, heads] += self._encode(member.float(), heads, hidden, step, buffers)
        return found

    def _encode(self, x: Tensor, heads: slice, hidden: Tensor | None, step: int, buffers: Tensor) -> Tensor:
        """Histograms [heads, M * E, runs] of x [heads, rows, d], without rows that are hidden (bool [heads, rows])."""
        (count, rows, _), (_, subspaces, codewords, size) = x.shape, self.words.shape
        parts = x.transpose(0, 1).reshape(rows, count * subspaces, size)
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
            stride = statistics_stride(rows)
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
    tiles, blocks = int(block_count(n, query_block)), int(block_count(m, key_block))
    scores = torch.zeros((b, h_kv, tiles, blocks))
    for row in range(b):
        keys = k[row].float()
        if visible is None:
            sizes = (m - torch.arange(blocks) * key_block).clamp(max=key_block).unsqueeze(-1)
        else:
            shown = visible[min(row, visible.shape[0] - 1)].unsqueeze(-1)  # [1 or h_kv, m, 1]
            keys = keys * shown
            sizes = _by_run(shown.float(), key_block).sum(2).clamp(min=1)
        means = _by_run(keys, key_block).sum(2) / sizes
        hidden = ~allowed[min(row, allowed.shape[0] - 1)].unsqueeze(-2)  # [1 or h_kv, tiles, 1, blocks]
        for member in q[row].unflatten(0, (h_kv, -1)).unbind(1):
            logits = _by_run(torch.bmm(member.float(), means.mT).mul_(scale), query_block)
            weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
            if n % query_block:
                weights[:, -1, n % query_block :] = 0.0
            scores[row] += weights.sum(2)
    return scores.nan_to_num_(0.0)


def _by_run(x: Tensor, step: int) -> Tensor:
    """[a, length, c] -> [a, runs, step, c], zeros at the end."""
    return pad(x, (0, 0, 0, -x.shape[1] % step)).unflatten(1, (-1, step))
