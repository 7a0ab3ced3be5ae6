"""The definition of `sptc::route`, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def route(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best blocks of each token, as list entries in the order of blocks, then tokens.

    Args:
        scores: [N, G]; ties go to the lower block, a NaN counts as the highest.
        active: blocks a token uses, 1 to G; on average if `keep` is given.
        keep: bool [N], the tokens that get more blocks than the others (see `budgets`).

    Returns:
        tokens and blocks of the entries, int64 [N * active]; offsets int32 [G + 1]: block g has entries offsets[g] to offsets[g + 1].
    """
    count, blocks = scores.shape
    shares = [active] * count if keep is None else budgets(keep.tolist(), blocks, active)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices.tolist()
    lists = [[t for t in range(count) if g in order[t][: shares[t]]] for g in range(blocks)]
    offsets = torch.tensor([sum(map(len, lists[:g])) for g in range(blocks + 1)], dtype=torch.int32)
    entries = torch.tensor([(t, g) for g, tokens in enumerate(lists) for t in tokens], dtype=torch.int64).reshape(-1, 2)
    return entries[:, 0], entries[:, 1], offsets


def budgets(keep: Sequence[bool], blocks: int, active: int) -> list[int]:
    """How many blocks each token gets, len(keep) * active in all.

    A kept token gets as many as leave the others max(1, active // 2) each, the same for every kept one, at most all `blocks`. The others
    share the rest as evenly as whole blocks allow, those with one more evenly spaced; none has more than `active`. So with none kept, with
    all kept, and for `active` of 1 or `blocks`, every token gets `active`.
    """
    kept = sum(keep)
    others = len(keep) - kept
    total = len(keep) * active
    most = min(blocks, (total - others * max(1, active // 2)) // kept) if kept else 0
    rest = total - kept * most
    shares = iter([(i + 1) * rest // others - i * rest // others for i in range(others)])
    return [most if flag else next(shares) for flag in keep]
