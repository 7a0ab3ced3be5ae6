"""Row lists of a graph: who is in them, and how many there may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sptc.passes.rewrite.token_lists import _lists

BATCH, LENGTH = 4, 128
N = BATCH * LENGTH


def tokens_of(seed: int, all_count: bool) -> tuple[Tensor, Tensor]:
    """Which tokens count, bool [N], and padding, [batch, tokens]: prompts, answers that count, and padding behind them."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(LENGTH)
    ends = torch.randint(90, LENGTH + 1, (BATCH, 1), generator=generator)
    starts = torch.randint(0, 1 if all_count else 80, (BATCH, 1), generator=generator)
    return ((place >= starts) & (place < ends)).flatten(), (place < ends).long()


@pytest.mark.parametrize("all_count", [False, True])
def test_lists_hold_what_is_read_and_have_few_lengths(all_count: bool) -> None:
    """oneDNN makes a kernel for each number of rows that a product has, and keeps a thousand of them."""
    lengths = set()
    for seed in range(20):
        mask, padding = tokens_of(seed, all_count)
        read = mask | (padding != 0).flatten()
        made = _lists(mask, padding, {"visible", "counted"}, known=True, averaged=False)
        every, visible = made["all"], made["visible"]
        assert torch.equal(every.counted, made["counted"].order) and torch.equal(every.counted, visible.counted)
        assert set(mask.nonzero().flatten().tolist()) <= set(every.counted.tolist())
        assert torch.equal(torch.cat([every.counted, every.context]).sort().values, torch.arange(N))
        assert torch.equal(torch.cat([visible.counted, visible.context]).sort().values, visible.order)
        assert set(read.nonzero().flatten().tolist()) <= set(visible.order.tolist())
        both = torch.cat([visible.among.counted, visible.among.context])
        assert torch.equal(both, torch.arange(len(visible.order)))
        rows = torch.cat([visible.counted, visible.context])
        assert bool(mask[rows[visible.among.counted_sample]].all())
        if not all_count:
            sampled = rows[visible.among.context_sample]
            assert not mask[sampled].any() and bool((padding != 0).flatten()[sampled].all())
        assert len(visible.order) <= int(read.sum()) + 2 * N // 16
        assert bool(mask[every.counted_sample].all()) and (all_count or not mask[every.context_sample].any())
        alone = _lists(None, padding, {"visible"}, known=False, averaged=False)["visible"].order
        assert set((padding != 0).flatten().nonzero().flatten().tolist()) <= set(alone.tolist())
        lengths |= {len(rows) for rows in (every.counted, every.context, visible.context, visible.order, alone)}
    assert lengths <= set(range(0, N + 1, N // 16))
