"""The product of list entries with the weights of their block: out[s] = sum over i of a_i[s] weight_i[block of s]."""

import triton
import triton.language as tl

from sptc.codegen.templates.grouping import list_segment, tile_position
from sptc.codegen.templates.language import many, unroll
from sptc.codegen.templates.philox import philox_keep, philox_keep_runs


@triton.jit
def grouped_product(
    a: many("INPUTS"),  # [capacity, WIDTH]
    weight: many("INPUTS"),  # [BLOCKS * WIDTH, COLUMNS], any strides
    weight_unit: many("INPUTS"),
    weight_column: many("INPUTS"),
    tokens,  # int32 [capacity]
    offsets,  # int32 [BLOCKS + 1]
    seed,
    threshold,  # of Philox, for the probability of being dropped
    kept,  # what a unit that is not dropped is multiplied by
    out,  # [capacity, COLUMNS]
    capacity,
    row_tiles,
    INPUTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M list entries of one block x BLOCK_N columns."""
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, tl.cdiv(COLUMNS, BLOCK_N), GROUP)
    block, first, end = list_segment(row_tile, offsets, capacity, BLOCKS, LANES, BLOCK_M)
    if block >= BLOCKS:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_list = row < end
    in_columns = column < COLUMNS
    # Rows of another block give sums that are not stored; they only have to exist.
    entry = tl.minimum(row, capacity - 1).to(tl.int64)
    unit = tl.arange(0, BLOCK_K)
    first_unit = block.to(tl.int64) * WIDTH
    if DROPOUT:
        token = tl.load(tokens + row, mask=in_list, other=0).to(tl.int64)
        drawn = token * (BLOCKS * WIDTH) + first_unit
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a_tile, weight_tile = {}, {}
    for i in unroll(INPUTS):
        a_tile[i] = a[i] + entry[:, None] * WIDTH + unit[None, :]
        weight_tile[i] = (
            weight[i] + first_unit * weight_unit[i] + column.to(tl.int64)[None, :] * weight_column[i] + unit[:, None] * weight_unit[i]
        )
        for k in range(0, WIDTH, BLOCK_K):
            if WIDTH % BLOCK_K == 0:
                rows = tl.load(a_tile[i])
                columns = tl.load(weight_tile[i], mask=in_columns[None, :], other=0.0)
            else:
                rows = tl.load(a_tile[i], mask=unit[None, :] < WIDTH - k, other=0.0)
                columns = tl.load(weight_tile[i], mask=in_columns[None, :] & (unit[:, None] < WIDTH - k), other=0.0)
            if DROPOUT:
                if WIDTH % 4 == 0:
                    keep = philox_keep_runs(seed, drawn + k, threshold, BLOCK_K)
                else:
                    keep = philox_keep(seed, (drawn + k)[:, None] + unit[None, :], threshold)
                rows = tl.where(keep, rows * kept, 0.0).to(columns.dtype)
            total = tl.dot(rows, columns, total, input_precision=PRECISION)
            a_tile[i] += BLOCK_K
            weight_tile[i] += BLOCK_K * weight_unit[i]
    inside = tl.arange(0, BLOCK_M)[:, None] * COLUMNS + column[None, :]
    tl.store(out + first.to(tl.int64) * COLUMNS + inside, total.to(out.dtype.element_ty), mask=in_list[:, None] & in_columns[None, :])
