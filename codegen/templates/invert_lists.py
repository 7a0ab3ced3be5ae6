"""For each token, the list entries that hold it."""

import triton
import triton.language as tl


@triton.jit
def invert_lists(
    tokens,  # int32 [capacity]
    offsets,  # int32 [BLOCKS + 1]
    counts,  # int32 [N], zeros
    entries,  # int32 [N, BLOCKS]
    BLOCKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK_E list entries, each put in a place of its own among those of its token.

    The places are in no certain order (who adds first comes first), which costs nothing: `gather_sum` takes entries by their number.
    """
    entry = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    used = entry < tl.load(offsets + BLOCKS)
    token = tl.load(tokens + entry, mask=used, other=0)
    place = tl.atomic_add(counts + token, 1, mask=used, sem="relaxed")
    tl.store(entries + token.to(tl.int64) * BLOCKS + place, entry, mask=used & (place < BLOCKS))
