"""Gradients of biases: for each block the sum of its entries' rows."""

import triton
import triton.language as tl


@triton.jit
def grouped_sum(
    rows,  # [capacity, WIDTH]
    offsets,  # int32 [BLOCKS + 1]
    out,  # [BLOCKS * WIDTH]
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N hidden units of one block, summed over the block's list entries in a fixed order."""
    unit_tiles = tl.cdiv(WIDTH, BLOCK_N)
    block = tl.program_id(0) // unit_tiles
    unit = (tl.program_id(0) % unit_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_block = unit < WIDTH
    start = tl.load(offsets + block)
    end = tl.load(offsets + block + 1)
    total = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    for s in range(start, end, BLOCK_E):
        entry = s + tl.arange(0, BLOCK_E)
        total += tl.load(
            rows + entry.to(tl.int64)[:, None] * WIDTH + unit[None, :], mask=(entry < end)[:, None] & in_block[None, :], other=0.0
        ).to(tl.float32)
    tl.store(out + block.to(tl.int64) * WIDTH + unit, tl.sum(total, 0).to(out.dtype.element_ty), mask=in_block)
