"""Selection of key blocks on a CPU: `sptc::select_blocks`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sptc.codegen.block_lists import block_count, list_width, lists_from_scores, nearest_first, owned, statistics_stride
from sptc.codegen.cpu.mask import CpuMask


def select_blocks(
    q: Tensor, k: Tensor, codebooks: Tensor | None, mask: CpuMask, selector: str, density: float, scale: float, own: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `docs/architecture.md`. Scores are computed in fp32."""
    n, m, query_block, key_block = mask.n, mask.m, mask.query_block, mask.key_block
    allowed, visible = mask.allowed_pairs(), mask.visible_keys()
    empty = torch.empty(0)
    sums, counts_of_codes = empty, empty
    if selector == "pq":
        assert codebooks is not None
        if statistics:
            sums, counts_of_codes = _statistics(q, k, codebooks, visible)
        scores = _agreements(q, k, codebooks, visible, query_block, key_block)
    else:
        scores = _pooled(q, k, visible, allowed, scale, query_block, key_block)
    must = owned(n, m, query_block, key_block, q.device) if own and query_block > 1 else None
    width = int(list_width(n, m, density, query_block, key_block, own))
    ids, counts = lists_from_scores(scores, allowed, must, nearest_first(n, m, query_block, key_block, q.device), width)
    return ids, counts, sums, counts_of_codes


def _codes(x: Tensor, codebooks: Tensor) -> Tensor:
    """x [rows of batch, h_kv, length, d], codebooks [h_kv, M, E, d / M] -> int64 [rows of batch, h_kv, M, length].

    The nearest codeword c has the greatest x.c - |c|^2 / 2. All sub-spaces go into one product, with a block-diagonal matrix:
    more arithmetic than M small products, in a shape that BLAS is fast at, and with the codewords on an axis that is fast to reduce.
    """
    h, subspaces, codewords, size = codebooks.shape
    diagonal = torch.zeros((h, subspaces, codewords, subspaces, size), dtype=torch.float32)
    index = torch.arange(subspaces)
    diagonal[:, index, :, index] = codebooks.float().transpose(0, 1)
    diagonal = diagonal.view(h, subspaces * codewords, subspaces * size)
    offset = codebooks.float().square().sum(-1).mul_(-0.5).view(h, subspaces * codewords, 1)
    codes = torch.empty((x.shape[0], h, subspaces, x.shape[2]), dtype=torch.int64)
    for row, out in zip(x, codes, strict=True):
        similarity = torch.baddbmm(offset, diagonal, row.float().mT)
        out.copy_(similarity.view(h, subspaces, codewords, -1).max(2).indices)
    return codes


def _histogram(codes: Tensor, codewords: int, step: int, visible: Tensor | None) -> Tensor:
    """Codes [b, h, M, length] -> how often each occurs in each run of `step` positions: fp32 [b, h, runs, M * E]."""
    b, h, subspaces, length = codes.shape
    runs = int(block_count(length, step))
    bins = runs * subspaces * codewords
    run = torch.arange(length).div_(step, rounding_mode="floor").mul_(subspaces * codewords)
    place = codes + (torch.arange(subspaces) * codewords).unsqueeze(1) + run + (torch.arange(b * h) * bins).view(b, h, 1, 1)
    if visible is not None:
        place = torch.where(visible.unsqueeze(2), place, b * h * bins)
    return torch.bincount(place.view(-1), minlength=b * h * bins + 1)[:-1].view(b, h, runs, subspaces * codewords).float()


def _agreements(q: Tensor, k: Tensor, codebooks: Tensor, visible: Tensor | None, query_block: int, key_block: int) -> Tensor:
    """Number of (query, key, subspace) agreements of each tile and block: fp32 [b, h_kv, tiles, blocks]."""
    h_kv, _, codewords, _ = codebooks.shape
    keys = _histogram(_codes(k, codebooks), codewords, key_block, visible)
    queries: Tensor | None = None
    for member in q.unflatten(1, (h_kv, -1)).unbind(2):
        histogram = _histogram(_codes(member, codebooks), codewords, query_block, None)
        queries = histogram if queries is None else queries.add_(histogram)
    assert queries is not None
    return queries @ keys.mT


def _statistics(q: Tensor, k: Tensor, codebooks: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum and count of the sub-vectors nearest to each codeword, over every stride-th row of q and of the visible k."""
    h_kv, subspaces, codewords, size = codebooks.shape
    q_step, k_step = statistics_stride(q.shape[2]), statistics_stride(k.shape[2])
    members = q[:, :, ::q_step].unflatten(1, (h_kv, -1)).unbind(2)
    parts: list[tuple[Tensor, Tensor | None]] = [(member, None) for member in members]
    parts.append((k[:, :, ::k_step], None if visible is None else visible[..., ::k_step]))
    sums, counts = torch.zeros(codebooks.shape), torch.zeros(codebooks.shape[:3])
    words = torch.arange(codewords).unsqueeze(1)
    for x, shown in parts:
        hot = _codes(x, codebooks).unsqueeze(3) == words  # [b, h_kv, M, E, rows]
        hot = hot.float() if shown is None else (hot & shown[:, :, None, None]).float()
        sums += torch.einsum("bhmer,bhrmi->hmei", hot, x.float().unflatten(-1, (subspaces, size)))
        counts += hot.sum((0, 4))
    return sums, counts


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
