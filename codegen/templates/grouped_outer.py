"""Gradients of weights: for each block the product of its entries' columns with the rows of their tokens."""

import triton
import triton.language as tl

from sptc.codegen.templates.grouping import tile_position
from sptc.codegen.templates.philox import philox_keep, philox_keep_runs


@triton.jit
def grouped_outer(
    left,  # [capacity, WIDTH]
    right,  # [N, COLUMNS], contiguous rows
    right_row,
    tokens,  # int32 [capacity]
    offsets,  # int32 [BLOCKS + 1]
    seed,
    threshold,  # of Philox, for the probability of being dropped
    kept,  # what a unit that is not dropped is multiplied by
    out,  # [BLOCKS * WIDTH, COLUMNS], any strides
    out_unit,
    out_column,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M hidden units of one block x BLOCK_N columns, summed over the block's list entries: zeros for an empty list."""
    unit_tiles = tl.cdiv(WIDTH, BLOCK_M)
    tiles = unit_tiles * tl.cdiv(COLUMNS, BLOCK_N)
    block = tl.program_id(0) // tiles
    unit_tile, column_tile = tile_position(tl.program_id(0) % tiles, unit_tiles, tl.cdiv(COLUMNS, BLOCK_N), GROUP)
    unit = unit_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_block = unit < WIDTH
    in_columns = column < COLUMNS
    first_unit = block.to(tl.int64) * WIDTH + unit_tile * BLOCK_M
    start = tl.load(offsets + block)
    end = tl.load(offsets + block + 1)
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for s in range(start, end, BLOCK_K):
        entry = s + lane
        in_list = entry < end
        token = tl.load(tokens + entry, mask=in_list, other=0).to(tl.int64)
        units = tl.load(left + entry.to(tl.int64)[:, None] * WIDTH + unit[None, :], mask=in_list[:, None] & in_block[None, :], other=0.0)
        rows = tl.load(right + token[:, None] * right_row + column[None, :], mask=in_list[:, None] & in_columns[None, :], other=0.0)
        if DROPOUT:
            drawn = token * (BLOCKS * WIDTH) + first_unit
            if WIDTH % 4 == 0:
                keep = philox_keep_runs(seed, drawn, threshold, BLOCK_M)
            else:
                keep = philox_keep(seed, drawn[:, None] + tl.arange(0, BLOCK_M)[None, :], threshold)
            units = tl.where(keep, units * kept, 0.0).to(rows.dtype)
        total = tl.dot(tl.trans(units), rows, total, input_precision=PRECISION)
    place = (first_unit + tl.arange(0, BLOCK_M))[:, None] * out_unit + column.to(tl.int64)[None, :] * out_column
    tl.store(out + place, total.to(out.dtype.element_ty), mask=in_block[:, None] & in_columns[None, :])
