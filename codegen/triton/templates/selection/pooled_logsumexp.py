"""The first of two passes of pooled selection: log-sum-exp of every run's logits with the keys that its tile may choose."""

import triton
import triton.language as tl


@triton.jit
def pooled_logsumexp(
    means_ptr, k_ptr, k_stride_b, k_stride_h, k_stride_n, k_stride_d, visible_ptr, visible_stride_b, visible_stride_h, pairs_ptr,
    pairs_stride_b, pairs_stride_h, lse_ptr, runs, keys, blocks, scale_log2, RUNS_PER_TILE: tl.constexpr, KEY_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, VISIBLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """lse fp32 [b, h, runs] in powers of two: not finite for a run without keys to choose, or whose mean or logits are not finite.

    means [b, h, runs, SIZE], contiguous; k [b, h_kv, keys, SIZE]; visible bool [1 or b, 1 or h_kv, keys]; pairs bool [1 or b, 1 or h_kv,
    tiles, blocks]. A program takes ROWS runs of one head through all keys, COLUMNS at a time. scale_log2 is scale * log2(e).
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    key_head = head // GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    lane = tl.arange(0, COLUMNS)
    mean_row = (batch * tl.num_programs(1) + head) * runs + row
    means = tl.load(
        means_ptr + mean_row[:, None] * SIZE + column[None, :], mask=(row < runs)[:, None] & (column < SIZE)[None, :], other=0.0
    )
    k_at = k_ptr + batch * k_stride_b + key_head * k_stride_h + column[None, :].to(tl.int64) * k_stride_d
    visible_at = visible_ptr + batch * visible_stride_b + key_head * visible_stride_h
    pairs_at = pairs_ptr + batch * pairs_stride_b + key_head * pairs_stride_h + row // RUNS_PER_TILE * blocks

    # Only blocks between the first and the last that a tile here may choose: of a causal mask, half of all.
    first = tl.full((COLUMNS,), 2147483647, dtype=tl.int32)
    end = tl.zeros((COLUMNS,), dtype=tl.int32)
    for start in range(0, blocks, COLUMNS):
        block = start + lane
        chosen = tl.load(pairs_at[:, None] + block[None, :], mask=(row < runs)[:, None] & (block < blocks)[None, :], other=False)
        some = tl.max(chosen.to(tl.int32), axis=0) > 0
        first = tl.where(some, tl.minimum(first, block), first)
        end = tl.where(some, block + 1, end)
    first_key = tl.minimum(tl.min(first, axis=0), tl.max(end, axis=0)) * KEY_BLOCK
    end_key = tl.minimum(tl.max(end, axis=0) * KEY_BLOCK, keys)

    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(first_key, end_key, COLUMNS):
        key = start + lane
        k = tl.load(k_at + key[:, None].to(tl.int64) * k_stride_n, mask=(key < keys)[:, None] & (column < SIZE)[None, :], other=0.0)
        if KEY_BLOCK % COLUMNS == 0:
            # These keys are of one block.
            chosen = tl.load(pairs_at + start // KEY_BLOCK, mask=row < runs, other=False).to(tl.int1)[:, None]
        else:
            chosen = tl.load(
                pairs_at[:, None] + (key // KEY_BLOCK)[None, :], mask=(row < runs)[:, None] & (key < keys)[None, :], other=False
            ).to(tl.int1)
        shown = key < keys
        if VISIBLE:
            shown = shown & tl.load(visible_at + key, mask=shown, other=False).to(tl.int1)
        logits = tl.dot(means, tl.trans(k), input_precision=PRECISION) * scale_log2
        logits = tl.where(chosen & shown[None, :], logits, float("-inf"))
        highest = tl.maximum(largest, tl.max(logits, axis=1))
        # A run that has met no key yet has no maximum to subtract: -inf - -inf would be NaN.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
        largest = highest
    # A NaN in the total stays one: a maximum may have passed over it.
    lse = largest + tl.log2(tl.where(largest == float("-inf"), 1.0, total))
    tl.store(lse_ptr + mean_row, lse, mask=row < runs)
