"""The second of two passes of pooled selection: softmax of queries against block means, summed over each tile and its group of heads."""

import triton
import triton.language as tl


@triton.jit
def pooled_scores(
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
    scores_ptr,
    queries,
    tiles,
    blocks,
    scale,
    QUERY_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scores fp32 [b, h_kv, tiles, blocks] from q [b, h, queries, SIZE], means [b, h_kv, blocks, SIZE] and lse fp32 [b, h, queries].

    pairs bool [1 or b, 1 or h_kv, tiles, blocks]. A program scores ROWS / RUN_ROWS tiles against COLUMNS blocks, with ROWS queries of one
    head at a time, RUN_ROWS of each tile.
    """
    columns = tl.cdiv(blocks, COLUMNS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_tile = (tl.program_id(0) // columns).to(tl.int64) * (ROWS // RUN_ROWS)
    block = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)
    tile = first_tile + tl.arange(0, ROWS // RUN_ROWS)
    row = tl.arange(0, ROWS)
    row_tile = first_tile + row // RUN_ROWS
    column = tl.arange(0, WIDTH)
    key_row = batch * tl.num_programs(1) + head
    means = tl.load(
        means_ptr + (key_row * blocks + block)[:, None] * SIZE + column[None, :],
        mask=(block < blocks)[:, None] & (column < SIZE)[None, :],
        other=0.0,
    )
    chosen = tl.load(
        pairs_ptr + batch * pairs_stride_b + head * pairs_stride_h + row_tile[:, None] * blocks + block[None, :],
        mask=(row_tile < tiles)[:, None] & (block < blocks)[None, :],
        other=False,
    ).to(tl.int1)
    scores = tl.zeros((ROWS // RUN_ROWS, COLUMNS), dtype=tl.float32)
    for member in range(GROUP):
        query_head = head * GROUP + member
        for start in range(0, QUERY_BLOCK, RUN_ROWS):
            within = start + row % RUN_ROWS
            position = row_tile * QUERY_BLOCK + within
            live = (within < QUERY_BLOCK) & (position < queries)
            q = tl.load(
                q_ptr
                + batch * q_stride_b
                + query_head * q_stride_h
                + position[:, None] * q_stride_n
                + column[None, :].to(tl.int64) * q_stride_d,
                mask=live[:, None] & (column < SIZE)[None, :],
                other=0.0,
            )
            lse = tl.load(lse_ptr + (key_row * GROUP + member) * queries + position, mask=live, other=0.0)
            logits = tl.dot(q, tl.trans(means), input_precision=PRECISION) * scale
            # Where the tile may choose a block at all, lse is finite.
            weights = tl.where(chosen & live[:, None], tl.exp(logits - lse[:, None]), 0.0)
            scores += tl.sum(tl.reshape(weights, (ROWS // RUN_ROWS, RUN_ROWS, COLUMNS)), axis=1)
    tl.store(
        scores_ptr + (key_row * tiles + tile)[:, None] * blocks + block[None, :],
        scores,
        mask=(tile < tiles)[:, None] & (block < blocks)[None, :],
    )
