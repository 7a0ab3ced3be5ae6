"""The hidden units of a routed FFN, from gathered tokens: every up projection at once, the activation in the epilogue."""

import triton
import triton.language as tl

from sptc.codegen.templates.grouping import halves, list_segment, tile_position
from sptc.codegen.templates.language import activation, many, unroll
from sptc.codegen.templates.philox import philox_keep, philox_keep_runs


@triton.jit
def ffn_up(
    x,  # [N, DEPTH], contiguous rows
    x_row,
    up: many("UPS"),  # [BLOCKS * WIDTH, DEPTH], any strides
    up_unit: many("UPS"),
    up_feature: many("UPS"),
    bias: many("UPS"),  # [BLOCKS * WIDTH]
    low: many("UPS"),  # [N, rank], contiguous rows
    low_row: many("UPS"),
    up_B: many("UPS"),  # [BLOCKS * WIDTH, rank], any strides
    up_B_unit: many("UPS"),
    up_B_rank: many("UPS"),
    rank: many("UPS"),
    tokens,  # int32 [capacity]
    offsets,  # int32 [BLOCKS + 1]
    scale,  # [capacity]
    seed,
    threshold,  # of Philox, for the probability of being dropped
    kept,  # what a unit that is not dropped is multiplied by
    pre,  # [UPS, capacity, WIDTH]
    hidden,  # [capacity, WIDTH]
    capacity,
    row_tiles,
    UPS: tl.constexpr,
    BIASED: tl.constexpr,  # bit i: up projection i has a bias
    ADAPTED: tl.constexpr,  # bit i: it has LoRA factors
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,  # a power of two: of the columns, one after the other in the epilogue
    PRECISION: tl.constexpr,
):
    """BLOCK_M list entries of one block x BLOCK_N of its hidden units."""
    row_tile, column_tile = tile_position(tl.program_id(0), row_tiles, tl.cdiv(WIDTH, BLOCK_N), GROUP)
    block, first, end = list_segment(row_tile, offsets, capacity, BLOCKS, LANES, BLOCK_M)
    if block > BLOCKS:
        return
    row = first + tl.arange(0, BLOCK_M)
    unit = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_list = row < end
    in_block = unit < WIDTH
    # Offsets within a tile fit in 32 bits; the tile's own place may not.
    plane = tl.cast(capacity, tl.int64) * WIDTH
    pre_tile = pre + first.to(tl.int64) * WIDTH
    # Entries of no list: backward may read what stands there, so it must be numbers.
    if block == BLOCKS:
        for i in unroll(UPS):
            tl.store(
                pre_tile + i * plane + (tl.arange(0, BLOCK_M)[:, None] * WIDTH + unit[None, :]),
                tl.zeros((BLOCK_M, BLOCK_N), pre.dtype.element_ty),
                mask=in_list[:, None] & in_block[None, :],
            )
        return

    token = tl.load(tokens + row, mask=in_list, other=0).to(tl.int64)
    first_unit = block.to(tl.int64) * WIDTH
    feature = tl.arange(0, BLOCK_K)
    x_tile = x + token[:, None] * x_row + feature[None, :]
    up_tile, columns, u = {}, {}, {}
    for i in unroll(UPS):
        up_tile[i] = up[i] + first_unit * up_unit[i] + (unit[None, :] * up_unit[i] + feature[:, None] * up_feature[i])
        u[i] = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            rows = tl.load(x_tile)
        else:
            rows = tl.load(x_tile, mask=feature[None, :] < DEPTH - k, other=0.0)
        # One tile of x serves all up projections.
        for i in unroll(UPS):
            if DEPTH % BLOCK_K == 0:
                columns[i] = tl.load(up_tile[i], mask=in_block[None, :], other=0.0)
            else:
                columns[i] = tl.load(up_tile[i], mask=in_block[None, :] & (feature[:, None] < DEPTH - k), other=0.0)
            u[i] = tl.dot(rows, columns[i], u[i], input_precision=PRECISION)
            up_tile[i] += BLOCK_K * up_feature[i]
        x_tile += BLOCK_K

    up_part = {}
    for i in unroll(UPS):
        if (ADAPTED >> i) & 1:
            for r in tl.range(0, rank[i], BLOCK_R, num_stages=1):
                factor_lane = r + tl.arange(0, BLOCK_R)
                in_rank = factor_lane < rank[i]
                factor = tl.load(low[i] + token[:, None] * low_row[i] + factor_lane[None, :], mask=in_rank[None, :], other=0.0)
                adapter = tl.load(
                    up_B[i] + first_unit * up_B_unit[i] + (unit[None, :] * up_B_unit[i] + factor_lane[:, None] * up_B_rank[i]),
                    mask=in_rank[:, None] & in_block[None, :],
                    other=0.0,
                )
                u[i] = tl.dot(factor, adapter, u[i], input_precision=PRECISION)
        up_part[UPS + i] = u[i]
        # A binary tree: node j has the halves 2 * j and 2 * j + 1, so that the leaves are in order.
        for j in unroll(SLICES - 1):
            up_part[(2 * j + 2) * UPS + i], up_part[(2 * j + 3) * UPS + i] = halves(up_part[(j + 1) * UPS + i])

    hidden_tile = hidden + first.to(tl.int64) * WIDTH
    for s in unroll(SLICES):
        lane = tl.arange(0, BLOCK_N // SLICES)
        part_first = column_tile * BLOCK_N + s * (BLOCK_N // SLICES)
        part_unit = part_first + lane
        in_part = part_unit < WIDTH
        inside = tl.arange(0, BLOCK_M)[:, None] * WIDTH + part_unit[None, :]
        stored = in_list[:, None] & in_part[None, :]
        for i in unroll(UPS):
            if (BIASED >> i) & 1:
                added = tl.load(bias[i] + first_unit + part_unit, mask=in_part, other=0.0).to(tl.float32)
                up_part[(SLICES + s) * UPS + i] += added[None, :]
            tl.store(pre_tile + i * plane + inside, up_part[(SLICES + s) * UPS + i].to(pre.dtype.element_ty), mask=stored)
        a = activation(*up_part[(SLICES + s) * UPS : (SLICES + s + 1) * UPS])
        if SCALED:
            a *= tl.load(scale + row, mask=in_list, other=0.0).to(tl.float32)[:, None]
        if DROPOUT:
            drawn = token * (BLOCKS * WIDTH) + first_unit + part_first
            if WIDTH % 4 == 0:
                keep = philox_keep_runs(seed, drawn, threshold, BLOCK_N // SLICES)
            else:
                keep = philox_keep(seed, drawn[:, None] + lane[None, :], threshold)
            a = tl.where(keep, a * kept, 0.0)
        tl.store(hidden_tile + inside, a.to(hidden.dtype.element_ty), mask=stored)
