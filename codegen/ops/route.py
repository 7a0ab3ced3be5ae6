"""Which blocks of hidden units each token uses: a choice, without gradient, made once for forward and backward.

No step waits for the device, and no shape depends on data.
"""

from __future__ import annotations

import torch
from torch import Tensor

_lib = torch.library.Library("sptc", "FRAGMENT")
_lib.define("route(Tensor scores, int active, Tensor? keep=None) -> (Tensor tokens, Tensor blocks, Tensor offsets)")


def route(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best blocks of each token, as list entries in the order of blocks, then tokens; see `sptc.codegen.reference.route`."""
    _check(scores, active, keep)
    pairs = _chosen_pairs(scores, active, keep)
    blocks, tokens = pairs.nonzero_static(size=scores.shape[0] * active).unbind(1)
    offsets = torch.nn.functional.pad(pairs.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return tokens.contiguous(), blocks.contiguous(), offsets


def _check(scores: Tensor, active: int, keep: Tensor | None) -> None:
    if scores.dim() != 2 or not 1 <= active <= scores.shape[1]:
        raise ValueError(f"sptc::route chooses 1 to G of scores [N, G], got active={active} of scores {list(scores.shape)}")
    if keep is not None and (keep.dtype != torch.bool or keep.dim() != 1 or keep.shape[0] != scores.shape[0]):
        raise ValueError(f"sptc::route: keep must be bool [{scores.shape[0]}], got {keep.dtype} {list(keep.shape)}")


def _chosen_pairs(scores: Tensor, active: int, keep: Tensor | None) -> Tensor:
    """The chosen (block, token) pairs, bool [G, N] with N * active of them."""
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


def _fake(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    _check(scores, active, keep)
    entries = scores.shape[0] * active
    tokens, blocks = (scores.new_empty(entries, dtype=torch.int64) for _ in range(2))
    return tokens, blocks, scores.new_empty(scores.shape[1] + 1, dtype=torch.int32)


for _key in ("CPU", "CUDA"):
    _lib.impl("route", route, _key)
torch.library.register_fake("sptc::route", _fake, lib=_lib)
torch.library.register_autograd("sptc::route", lambda ctx, *grads: (None, None, None), lib=_lib)
