"""The best blocks of each tile of queries, as an ascending list: no sort, only counts."""

import triton
import triton.language as tl


@triton.jit
def ranking_keys(
    scores_at, pairs_at, block, blocks, first, last, NEAR_BITS: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """int64, distinct, in the order of preference: by score, then by nearness; -1 for a block that is not allowed.

    `first` and `last` are the key positions of the tile's first and last query.
    """
    live = block < blocks
    keep = tl.load(pairs_at + block, mask=live, other=False).to(tl.int1)
    score = tl.load(scores_at + block, mask=live & keep, other=0.0)
    start = block.to(tl.int64) * KEY_BLOCK
    if OWN:
        score = tl.where((last >= start) & (first < start + KEY_BLOCK), float("inf"), score)
    # The bits of a float, read as an integer, are in the order of the numbers; for negative ones in the reverse order.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    # Twice the distance of the centres keeps half positions integral. Two blocks may be equally far: the lower one is the nearer.
    distance = 2 * (first - start) + (QUERY_BLOCK - KEY_BLOCK)
    farness = 2 * tl.abs(distance) + (distance < 0).to(tl.int64)
    return tl.where(keep, (bits << NEAR_BITS) + ((1 << NEAR_BITS) - 1 - farness), -1)


@triton.jit
def choose_blocks(
    scores_ptr, pairs_ptr, pairs_stride_b, pairs_stride_h, ids_ptr, counts_ptr, queries, keys, tiles, blocks, width,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, OWN: tl.constexpr, NEAR_BITS: tl.constexpr, CHUNK: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """ids int32 [b, h_kv, tiles, width], ascending, zeros after the first counts int32 [b, h_kv, tiles].

    scores fp32 [b, h_kv, tiles, blocks], finite; pairs bool [1 or b, 1 or h_kv, tiles, blocks]. With OWN the blocks that hold the position
    of a query of the tile come first. A program makes one list; it looks at CHUNK blocks at a time, SINGLE if that is all of them.
    """
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    made = (batch * tl.num_programs(1) + head) * tiles + tile
    scores_at = scores_ptr + made * blocks
    pairs_at = pairs_ptr + batch * pairs_stride_b + head * pairs_stride_h + tile * blocks
    first = tile * QUERY_BLOCK + (keys - queries)
    last = tl.minimum((tile + 1) * QUERY_BLOCK, queries) - 1 + (keys - queries)
    offset = tl.arange(0, CHUNK)

    # The width-th largest key, bit by bit: the greatest threshold that at least `width` keys reach, or 0 if fewer blocks are allowed.
    if SINGLE:
        key = ranking_keys(scores_at, pairs_at, offset, blocks, first, last, NEAR_BITS, QUERY_BLOCK, KEY_BLOCK, OWN)
    threshold = tl.zeros((), dtype=tl.int64)
    bit = tl.full((), 1, dtype=tl.int64) << (NEAR_BITS + 31)
    for _ in range(NEAR_BITS + 32):
        if SINGLE:
            reached = tl.sum((key >= threshold + bit).to(tl.int32), axis=0)
        else:
            reached = 0
            for start in range(0, blocks, CHUNK):
                key = ranking_keys(scores_at, pairs_at, start + offset, blocks, first, last, NEAR_BITS, QUERY_BLOCK, KEY_BLOCK, OWN)
                reached += tl.sum((key >= threshold + bit).to(tl.int32), axis=0)
        threshold = tl.where(reached >= width, threshold + bit, threshold)
        bit = bit >> 1

    # Keys are distinct, so exactly the best `width` reach it.
    count = 0
    for start in range(0, blocks, CHUNK):
        if not SINGLE:
            key = ranking_keys(scores_at, pairs_at, start + offset, blocks, first, last, NEAR_BITS, QUERY_BLOCK, KEY_BLOCK, OWN)
        best = (key >= threshold).to(tl.int32)
        slot = count + tl.cumsum(best, axis=0) - 1
        tl.store(ids_ptr + made * width + slot, (start + offset).to(tl.int32), mask=best != 0)
        count += tl.sum(best, axis=0)
    for start in range(0, width, CHUNK):
        slot = start + offset
        tl.store(ids_ptr + made * width + slot, tl.zeros((CHUNK,), dtype=tl.int32), mask=(slot >= count) & (slot < width))
    tl.store(counts_ptr + made, count)
