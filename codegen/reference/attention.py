"""The definition of sparse attention: any device and floating dtype, n x n matrices everywhere, differentiable by autograd.

docs/design/operators.md says the same in words. Shapes: q [b, h, n, d], k [b, h_kv, m, d], v [b, h_kv, m, d_v]; query head i uses key head
i // (h / h_kv).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from sptc.codegen.reference.block_lists import (
    block_count,
    list_width,
    lists_from_scores,
    nearest_first,
    owned,
    query_run,
    statistics_stride,
)
from sptc.codegen.reference.random import keep_mask
from sptc.ir import expression
from sptc.ir.predicate import parse


@dataclass(frozen=True)
class Mask:
    """The three operands of a mask, as the ops take them."""

    predicate: str = "True"
    tensors: Sequence[Tensor] = ()
    sizes: Sequence[int] = ()
    boolean: Tensor | None = None  # bool, broadcastable to [b, h, n, m]
    bias: Tensor | None = None  # broadcastable to [b, h, n, m]; values <= finfo.min mask

    def allowed(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
        """bool [b, h, n, m]."""
        result = torch.ones(shape, dtype=torch.bool, device=device)
        for operand, _ in self._operands(shape, device):
            result = result & operand
        return result

    def visible(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
        """bool [b, h, m]: keys that no operand hides, on its own, from every query. Conjuncts that look at q hide none."""
        b, h, _, m = shape
        result = torch.ones((b, h, m), dtype=torch.bool, device=device)
        for operand, looks_at_q in self._operands(shape, device):
            if not looks_at_q:
                result = result & operand.expand(shape).any(2)
        return result

    def _operands(self, shape: tuple[int, int, int, int], device: torch.device) -> list[tuple[Tensor, bool]]:
        b, h, q, k = (torch.arange(size, device=device).view([-1 if i == axis else 1 for i in range(4)]) for axis, size in enumerate(shape))
        conjuncts = parse(self.predicate).conjuncts
        found = [(c.evaluate(b, h, q, k, self.tensors, self.sizes), c.uses("q")) for c in conjuncts]
        if self.boolean is not None:
            found.append((self.boolean, False))
        if self.bias is not None:
            found.append((self.bias > torch.finfo(self.bias.dtype).min, False))
        return found


def encode(x: Tensor, codebooks: Tensor) -> Tensor:
    """Nearest codewords. x [b, h_kv, rows, d], codebooks [h_kv, M, E, d / M] -> int64 [b, h_kv, rows, M]."""
    parts = x.unflatten(-1, (codebooks.shape[1], 1, -1)).to(codebooks.dtype)
    return (parts - codebooks[:, None]).square().sum(-1).argmin(-1)


def select_blocks(
    q: Tensor, k: Tensor, codebooks: Tensor | None, mask: Mask, selector: str, density: float, scale: float, query_block: int,
    key_block: int, own: bool, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ids, counts, code_sums, code_counts of `sptc::select_blocks`."""
    (b, h, n, _), (h_kv, m), group = q.shape, k.shape[1:3], q.shape[1] // k.shape[1]
    shape = (b, h, n, m)
    allowed, visible = choosable(mask, shape, h_kv, query_block, key_block, q.device)
    queries = q.unflatten(1, (h_kv, group)).flatten(2, 3)  # [b, h_kv, group * n, d]

    if selector == "pq":
        assert codebooks is not None
        q_hot = one_hot(encode(queries, codebooks), codebooks.shape[2]).double()  # [b, h_kv, group * n, M, E]
        k_hot = one_hot(encode(k, codebooks), codebooks.shape[2]).double() * visible[..., None, None]
        q_histogram = _runs(q_hot.unflatten(2, (group, n)).sum(2).flatten(3), query_block).sum(3)
        scores = q_histogram @ _runs(k_hot.flatten(3), key_block).sum(3).mT
    else:
        scores = pooled_scores(pooled_means(q, query_block), k, allowed, visible, scale, query_block, key_block)

    width = int(list_width(n, m, density, query_block, key_block, own))
    must = owned(n, m, query_block, key_block, q.device) if own and query_block > 1 else None
    ids, counts = lists_from_scores(scores, allowed, must, nearest_first(n, m, query_block, key_block, q.device), width)
    if codebooks is None or not statistics:
        return ids, counts, q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)
    q_rows, k_rows = (torch.arange(0, length, statistics_stride(b, length), device=q.device) for length in (n, m))
    hot = torch.cat((q_hot.unflatten(2, (group, n))[:, :, :, q_rows].flatten(2, 3), k_hot[:, :, k_rows]), 2)
    rows = torch.cat((queries.unflatten(2, (group, n))[:, :, :, q_rows].flatten(2, 3), k[:, :, k_rows]), 2)
    parts = rows.unflatten(-1, (codebooks.shape[1], -1)).double()
    return ids, counts, torch.einsum("bhrme,bhrmi->hmei", hot, parts).float(), hot.sum((0, 2)).float()


def pooled_means(q: Tensor, query_block: int) -> Tensor:
    """[b, h, runs, d]: the mean query of each run (`query_run`), of the rows that exist."""
    n, run = q.shape[2], query_run(query_block)
    within = torch.arange(block_count(n, run) * run, device=q.device).view(-1, run, 1) < n
    return _runs(q, run).sum(3) / within.sum(1)


def pooled_scores(means: Tensor, k: Tensor, allowed: Tensor, visible: Tensor, scale: float, query_block: int, key_block: int) -> Tensor:
    """Scores [b, h_kv, tiles, blocks] of means [b, h, runs, d] and k; `allowed` is bool of that shape, `visible` bool [b, h_kv, m]."""
    h_kv, m = k.shape[1:3]
    group, runs_per_tile = means.shape[1] // h_kv, query_block // query_run(query_block)
    open_keys = allowed.repeat_interleave(runs_per_tile, 2)[:, :, : means.shape[2]].repeat_interleave(key_block, 3)[..., :m]
    open_keys = (open_keys & visible.unsqueeze(2)).repeat_interleave(group, 1)
    logits = scale * means @ k.masked_fill(~visible.unsqueeze(-1), 0.0).repeat_interleave(group, 1).mT
    weights = logits.masked_fill(~open_keys, -math.inf).softmax(-1).nan_to_num(0.0)
    return _blocked(weights, runs_per_tile, key_block).sum((-2, -1)).unflatten(1, (h_kv, group)).sum(2)


def choosable(
    mask: Mask, shape: tuple[int, int, int, int], h_kv: int, query_block: int, key_block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What lists may hold, bool [b, h_kv, tiles, blocks], and the keys that are visible, bool [b, h_kv, m], of `shape` = [b, h, n, m]."""
    pairs = _blocked(mask.allowed(shape, device), query_block, key_block).flatten(-2).any(-1)  # [b, h, tiles, blocks]
    return pairs.unflatten(1, (h_kv, -1)).any(2), mask.visible(shape, device).unflatten(1, (h_kv, -1)).any(2)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, mask: Mask, seed: Tensor | None, dropout_p: float, scale: float,
    query_block: int, key_block: int, transform: str = "u0", sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [b, h, n, d_v] and lse [b, h, n] of `sptc::sparse_attention`, in the dtype of q."""
    (b, h, n, _), m, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    keep = mask.allowed((b, h, n, m), q.device)
    keep = keep & listed(ids, counts, n, m, query_block, key_block).repeat_interleave(group, 1)
    scores = expression.evaluate(expression.parse(transform), scale * q @ k.repeat_interleave(group, 1).mT)
    if mask.bias is not None:
        scores = scores + mask.bias.to(scores.dtype)
    scores = scores.masked_fill(~keep, -math.inf)
    if sink is not None:
        scores = torch.cat((scores, sink.to(scores.dtype)), -1)
    empty = ~keep.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., :m]
    if seed is not None and dropout_p > 0.0:
        survivors = keep_mask(seed, torch.arange(b * h * n * m, device=q.device), dropout_p).view(b, h, n, m)
        weights = torch.where(survivors, weights / max(1.0 - dropout_p, 2.0**-32), 0.0)
    return weights @ v.repeat_interleave(group, 1), scores.logsumexp(-1)


def listed(ids: Tensor, counts: Tensor, n: int, m: int, query_block: int, key_block: int) -> Tensor:
    """bool [b, h_kv, n, m]: the key's block is in the list of the query's tile."""
    valid = torch.arange(ids.shape[-1], device=ids.device) < counts.unsqueeze(-1)
    pairs = torch.zeros((*ids.shape[:-1], block_count(m, key_block)), dtype=torch.int32, device=ids.device)
    pairs.scatter_add_(-1, ids.long(), valid.to(torch.int32))
    return (pairs > 0).repeat_interleave(query_block, 2)[:, :, :n].repeat_interleave(key_block, 3)[..., :m]


def _runs(x: Tensor, step: int) -> Tensor:
    """[a, b, length, c] -> [a, b, ceil(length / step), step, c], zeros at the end."""
    return pad(x, (0, 0, 0, -x.shape[2] % step)).unflatten(2, (-1, step))


def _blocked(x: Tensor, query_block: int, key_block: int) -> Tensor:
    """[b, h, n, m] -> [b, h, tiles, blocks, query_block, key_block], False at the ends."""
    n, m = x.shape[-2:]
    x = pad(x, (0, -m % key_block, 0, -n % query_block))
    return x.unflatten(3, (-1, key_block)).unflatten(2, (-1, query_block)).transpose(3, 4)
