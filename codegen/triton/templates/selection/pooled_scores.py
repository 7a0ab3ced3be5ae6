"""The second of two passes of pooled selection: softmax of runs against keys, summed over the keys of a block and the runs of a tile."""

import triton
import triton.language as tl


@triton.jit
def pooled_scores(
    means_ptr, k_ptr, k_stride_b, k_stride_h, k_stride_n, k_stride_d, visible_ptr, visible_stride_b, visible_stride_h, pairs_ptr,
    pairs_stride_b, pairs_stride_h, lse_ptr, scores_ptr, runs, keys, tiles, blocks, scale_log2, RUNS_PER_TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, VISIBLE: tl.constexpr, ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores fp32 [b, h_kv, tiles, blocks] from means [b, h, runs, SIZE], k [b, h_kv, keys, SIZE] and lse fp32 [b, h, runs].

    visible bool [1 or b, 1 or h_kv, keys]; pairs bool [1 or b, 1 or h_kv, tiles, blocks]. A program scores ROWS / TILE_ROWS tiles against
    COLUMNS / BLOCK_COLUMNS blocks, TILE_ROWS runs by BLOCK_COLUMNS keys of each pair at a time. scale_log2 is scale * log2(e).
    """
    tile_count: tl.constexpr = ROWS // TILE_ROWS
    block_count: tl.constexpr = COLUMNS // BLOCK_COLUMNS
    columns = tl.cdiv(blocks, block_count)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_tile = (tl.program_id(0) // columns).to(tl.int64) * tile_count
    first_block = tl.program_id(0) % columns * block_count
    tile = first_tile + tl.arange(0, tile_count)
    block = first_block + tl.arange(0, block_count)
    inside = (tile < tiles)[:, None] & (block < blocks)[None, :]
    chosen = tl.load(
        pairs_ptr + batch * pairs_stride_b + head * pairs_stride_h + tile[:, None] * blocks + block[None, :], mask=inside, other=False
    ).to(tl.int1)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    column = tl.arange(0, WIDTH)
    key_row = batch * tl.num_programs(1) + head
    k_at = k_ptr + batch * k_stride_b + head * k_stride_h + column[None, :].to(tl.int64) * k_stride_d
    visible_at = visible_ptr + batch * visible_stride_b + head * visible_stride_h
    scores = tl.zeros((tile_count, block_count), dtype=tl.float32)
    some = tl.max(tl.max(chosen.to(tl.int32), axis=1), axis=0)
    for first_key in range(0, some * KEY_BLOCK, BLOCK_COLUMNS):
        in_block = first_key + lane % BLOCK_COLUMNS
        key = (first_block + lane // BLOCK_COLUMNS) * KEY_BLOCK + in_block
        shown = (in_block < KEY_BLOCK) & (key < keys)
        k = tl.load(k_at + key[:, None].to(tl.int64) * k_stride_n, mask=shown[:, None] & (column < SIZE)[None, :], other=0.0)
        if VISIBLE:
            shown = shown & tl.load(visible_at + key, mask=shown, other=False).to(tl.int1)
        for member in range(GROUP):
            for first_run in range(0, RUNS_PER_TILE, TILE_ROWS):
                in_tile = first_run + row % TILE_ROWS
                run = (first_tile + row // TILE_ROWS) * RUNS_PER_TILE + in_tile
                live = (in_tile < RUNS_PER_TILE) & (run < runs)
                mean_row = (key_row * GROUP + member) * runs + run
                means = tl.load(
                    means_ptr + mean_row[:, None] * SIZE + column[None, :], mask=live[:, None] & (column < SIZE)[None, :], other=0.0
                )
                lse = tl.load(lse_ptr + mean_row, mask=live, other=float("inf"))
                logits = tl.dot(means, tl.trans(k), input_precision=PRECISION) * scale_log2
                # A run without a finite lse has no say.
                counted = (tl.abs(lse) < float("inf"))[:, None] & shown[None, :]
                weights = tl.where(counted, tl.exp2(logits - lse[:, None]), 0.0)
                of_blocks = tl.sum(tl.reshape(weights, (ROWS, block_count, BLOCK_COLUMNS)), axis=2)
                scores += tl.sum(tl.reshape(of_blocks, (tile_count, TILE_ROWS, block_count)), axis=1)
    # Keys outside the chosen pairs have no part in lse, and weights that mean nothing.
    tl.store(
        scores_ptr + (key_row * tiles + tile)[:, None] * blocks + block[None, :],
        tl.where(chosen, scores, 0.0),
        mask=inside,
    )
