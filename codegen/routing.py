"""Which blocks each token uses: what the routes of all devices share. No step waits for the device, and no shape depends on data."""

from __future__ import annotations

import torch
from torch import Tensor


def chosen_pairs(scores: Tensor, active: int, keep: Tensor | None) -> Tensor:
    """The (block, token) pairs that `sptc::route` chooses, bool [G, N] with N * active of them; see `sptc.codegen.reference.ffn.route`."""
    count, blocks = scores.shape
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    pairs = torch.zeros((blocks, count), dtype=torch.bool, device=scores.device)
    if keep is None:
        return pairs.scatter_(0, order[:, :active].t(), True)
    best = torch.arange(blocks, device=scores.device).unsqueeze(1) < _budgets(keep, blocks, active)
    return pairs.scatter_(0, order.t(), best)


def _budgets(keep: Tensor, blocks: int, active: int) -> Tensor:
    """How many blocks each token gets, int64 [N]: N * active in all."""
    kept = keep.sum()
    others = keep.shape[0] - kept
    gain = (others * (active - max(1, active // 2)) // kept.clamp(min=1)).clamp(max=blocks - active)
    rest = others * active - kept * gain
    place = torch.cumsum(~keep, 0)  # from 1, among the others
    left = others.clamp(min=1)
    return torch.where(keep, active + gain, place * rest // left - (place - 1) * rest // left)
