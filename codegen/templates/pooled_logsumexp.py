"""The first of two passes of pooled selection: log-sum-exp of every query's logits against the means of the blocks it may choose."""

import triton
import triton.language as tl


@triton.jit
def pooled_logsumexp(
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    means_ptr,
    pairs_ptr,
    pairs_stride_b,
    pairs_stride_h,
    lse_ptr,
    queries,
    blocks,
    scale,
    QUERY_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """lse fp32 [b, h, queries]; -inf for a query whose tile may choose nothing.

    q [b, h, queries, SIZE]; means [b, h_kv, blocks, SIZE], contiguous; pairs bool [1 or b, 1 or h_kv, tiles, blocks]. A program takes ROWS
    queries of one head through all blocks, COLUMNS at a time.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    key_head = head // GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    q = tl.load(
        q_ptr + batch * q_stride_b + head * q_stride_h + row[:, None] * q_stride_n + column[None, :].to(tl.int64) * q_stride_d,
        mask=(row < queries)[:, None] & (column < SIZE)[None, :],
        other=0.0,
    )
    means_at = means_ptr + (batch * (tl.num_programs(1) // GROUP) + key_head) * blocks * SIZE
    pairs_at = pairs_ptr + batch * pairs_stride_b + key_head * pairs_stride_h + (row // QUERY_BLOCK)[:, None] * blocks
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, blocks, COLUMNS):
        block = start + tl.arange(0, COLUMNS)
        means = tl.load(
            means_at + block[:, None] * SIZE + column[None, :], mask=(block < blocks)[:, None] & (column < SIZE)[None, :], other=0.0
        )
        live = (row < queries)[:, None] & (block < blocks)[None, :]
        chosen = tl.load(pairs_at + block[None, :], mask=live, other=False).to(tl.int1)
        logits = tl.where(chosen, tl.dot(q, tl.trans(means), input_precision=PRECISION) * scale, float("-inf"))
        highest = tl.maximum(largest, tl.max(logits, axis=1))
        # A row that has met no block yet has no maximum to subtract: -inf - -inf would be NaN.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        largest = highest
    lse = tl.where(largest == float("-inf"), float("-inf"), largest + tl.log(tl.where(total > 0.0, total, 1.0)))
    tl.store(lse_ptr + (batch * tl.num_programs(1) + head) * queries + row, lse, mask=row < queries)
