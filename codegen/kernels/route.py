"""Lists of tokens by block, and back from tokens to list entries: on the device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sptc.codegen.launch import Argument, launch
from sptc.codegen.routing import chosen_pairs
from sptc.codegen.spec import KernelSpec

_ENTRIES = 256  # that a program of `invert_lists` places


def route(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See `sptc.codegen.reference.ffn.route`.

    The lists are the places of the chosen pairs in a mask [G, N]. As their number is known, a search for the first place at which the
    count of chosen pairs reaches 1, 2, ... finds them without asking the device how many there are.
    """
    count, blocks = scores.shape
    if count == 0:
        empty = scores.new_empty(0, dtype=torch.int64)
        return empty.to(torch.int32), torch.zeros(blocks + 1, dtype=torch.int32, device=scores.device), empty
    reached = torch.cumsum(chosen_pairs(scores, active, keep).view(-1), 0, dtype=torch.int32)
    wanted = torch.arange(1, count * active + 1, dtype=torch.int32, device=scores.device)
    place = torch.searchsorted(reached, wanted)
    block, token = place // count, place % count
    offsets = torch.nn.functional.pad(reached.view(blocks, count)[:, -1], (1, 0))
    return token.to(torch.int32), offsets, token * blocks + block


@dataclass(frozen=True)
class Index:
    """For each token the list entries that hold it: the first counts[t] of entries[t], in any order. int32 [N] and [N, G]."""

    counts: Tensor
    entries: Tensor


def invert(tokens: Tensor, offsets: Tensor, count: int) -> Index:
    """The entries of each of `count` tokens, one pass over the lists; a stable sort of them would take several times as long.

    Args:
        tokens: int32 [capacity], of which the first offsets[G] count; a token stands in them at most G times.
        offsets: int32 [G + 1].
    """
    capacity, blocks = tokens.shape[0], offsets.shape[0] - 1
    counts = torch.zeros(count, dtype=torch.int32, device=tokens.device)
    entries = torch.empty((count, blocks), dtype=torch.int32, device=tokens.device)
    spec = KernelSpec.of("invert_lists", {"BLOCKS": blocks, "BLOCK_E": _ENTRIES})
    arguments: dict[str, Argument] = {"tokens": tokens, "offsets": offsets, "counts": counts, "entries": entries}
    launch(spec, (-(-capacity // _ENTRIES),), tokens.device, arguments)
    return Index(counts, entries)
