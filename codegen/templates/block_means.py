"""Means of the visible keys of each block."""

import triton
import triton.language as tl


@triton.jit
def block_means(
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    visible_ptr,
    visible_stride_b,
    visible_stride_h,
    means_ptr,
    keys,
    blocks,
    KEY_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    VISIBLE: tl.constexpr,
    ROWS: tl.constexpr,
    RUN_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """means [b, h_kv, blocks, SIZE] of k [b, h_kv, keys, SIZE]; zeros for a block without visible keys.

    visible bool [1 or b, 1 or h_kv, keys]. A program takes ROWS keys at a time, RUN_ROWS of each of its blocks.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_block = tl.program_id(0).to(tl.int64) * (ROWS // RUN_ROWS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS // RUN_ROWS, WIDTH), dtype=tl.float32)
    count = tl.zeros((ROWS // RUN_ROWS,), dtype=tl.float32)
    for start in range(0, KEY_BLOCK, RUN_ROWS):
        within = start + row % RUN_ROWS
        position = (first_block + row // RUN_ROWS) * KEY_BLOCK + within
        live = (within < KEY_BLOCK) & (position < keys)
        if VISIBLE:
            live = live & tl.load(visible_ptr + batch * visible_stride_b + head * visible_stride_h + position, mask=live, other=False).to(
                tl.int1
            )
        k = tl.load(
            k_ptr + batch * k_stride_b + head * k_stride_h + position[:, None] * k_stride_n + column[None, :].to(tl.int64) * k_stride_d,
            mask=live[:, None] & (column < SIZE)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(tl.reshape(k, (ROWS // RUN_ROWS, RUN_ROWS, WIDTH)), axis=1)
        count += tl.sum(tl.reshape(live.to(tl.float32), (ROWS // RUN_ROWS, RUN_ROWS)), axis=1)
    block = first_block + tl.arange(0, ROWS // RUN_ROWS)
    tl.store(
        means_ptr + ((batch * tl.num_programs(1) + head) * blocks + block)[:, None] * SIZE + column[None, :],
        (total / tl.maximum(count, 1.0)[:, None]).to(means_ptr.dtype.element_ty),
        mask=(block < blocks)[:, None] & (column < SIZE)[None, :],
    )
