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
        scores, sums, code_counts = _agreements(q, k, codebooks, visible, query_block, key_block, statistics)
    else:
        scores = _pooled(q, k, visible, allowed, scale, query_block, key_block)
    must = owned(n, m, query_block, key_block, q.device) if own and query_block > 1 else None
    width = int(list_width(n, m, density, query_block, key_block, own))
    ids, counts = lists_from_scores(scores, allowed, must, nearest_first(n, m, query_block, key_block, q.device), width)
    return ids, counts, *(torch.empty(0) if x is None else x for x in (sums, code_counts))


@dataclass(frozen=True)
class _Codebooks:
    """Codebooks [h_kv, M, E, d / M] in fp32, their statistics, and how ties are met."""

    words: Tensor
    offset: Tensor  # [h_kv, M, E]: -|c|^2 / 2, so that the nearest codeword c of x has the greatest x.c + offset
    sums: Tensor | None  # [h_kv, M, E, d / M], added to; None if no statistics are asked for
    counts: Tensor | None  # [h_kv, M, E]
    careful: bool  # equally near codewords: mark the first only, at many times the cost

    @classmethod
    def of(cls, codebooks: Tensor, statistics: bool, careful: bool) -> _Codebooks:
        words = codebooks.float()
        sums, counts = (torch.zeros(words.shape), torch.zeros(words.shape[:3])) if statistics else (None, None)
        return cls(words, words.square().sum(-1).mul_(-0.5), sums, counts, careful)

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
                    hot = self._one_hot(member.float(), heads, hidden, buffers)  # [heads * M, E, rows]
                    found[batch, heads] += _run_sums(hot, step).view(heads.stop - first, subspaces * codewords, -1)
        return found

    def _one_hot(self, x: Tensor, heads: slice, hidden: Tensor | None, buffers: Tensor) -> Tensor:
        """1 where a codeword is the nearest of a row that is not hidden. x [heads, rows, d], hidden bool [heads, rows]."""
        (count, rows, _), (_, subspaces, codewords, size) = x.shape, self.words.shape
        parts = x.transpose(0, 1).reshape(rows, count * subspaces, size)
        shape = (count * subspaces, codewords, rows)
        similarity, hot = (buffer[: shape[0] * codewords * rows].view(shape) for buffer in buffers)
        offset = self.offset[heads].reshape(-1, codewords, 1).expand(shape)
        torch.baddbmm(offset, self.words[heads].reshape(-1, codewords, size), parts.permute(1, 2, 0), out=similarity)
        best, first = similarity.max(1, keepdim=True) if self.careful else (similarity.amax(1, keepdim=True), None)
        if first is not None:
            hot.zero_().scatter_(1, first, 1.0)
        if hidden is not None:
            best.view(count, subspaces, rows).masked_fill_(hidden.unsqueeze(1), math.inf)
        if first is None:
            torch.eq(similarity, best, out=hot)
        elif hidden is not None:
            hot.view(count, -1, rows).masked_fill_(hidden.unsqueeze(1), 0.0)
        if self.sums is not None and self.counts is not None:
            stride = statistics_stride(rows)
            marks = hot[..., ::stride].contiguous()
            self.sums[heads] += torch.bmm(marks, parts[::stride].transpose(0, 1)).view_as(self.sums[heads])
            self.counts[heads] += marks.sum(-1).view_as(self.counts[heads])
        return hot


def _run_sums(x: Tensor, step: int) -> Tensor:
    """Sums over runs of `step` along the last axis; the last run may be shorter."""
    length = x.shape[-1]
    whole = length // step * step
    sums = x[..., :whole].unflatten(-1, (-1, step)).sum(-1) if whole else x[..., :0]
    return sums if whole == length else torch.cat((sums, x[..., whole:].sum(-1, keepdim=True)), -1)


def _agreements(
    q: Tensor, k: Tensor, codebooks: Tensor, visible: Tensor | None, query_block: int, key_block: int, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Agreements (query, key, subspace) of each tile and block, fp32 [b, h_kv, tiles, blocks]; sums and counts for codebook updates."""
    (b, h_kv, m, _), subspaces = k.shape, codebooks.shape[1]
    shown = b * h_kv * m if visible is None else int(visible.expand(b, h_kv, m).sum())
    expected = subspaces * (shown + q.shape[0] * q.shape[1] * q.shape[2])
    for careful in (False, True):
        books = _Codebooks.of(codebooks, statistics, careful)
        queries, keys = books.histograms(q, query_block, None), books.histograms(k, key_block, visible)
        if int(queries.sum(dtype=torch.float64) + keys.sum(dtype=torch.float64)) == expected:
            break  # one mark for each sub-vector: there were no ties
    return queries.mT @ keys, books.sums, books.counts


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
