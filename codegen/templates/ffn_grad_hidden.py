"""Gradients of the hidden units of a routed FFN: through down, dropout, the scores and the activation to its inputs."""

import triton
import triton.language as tl

from sptc.codegen.templates.grouping import halves, list_segment, tile_position
from sptc.codegen.templates.language import activation, activation_backward, unroll
from sptc.codegen.templates.philox import philox_keep, philox_keep_runs


@triton.jit
def ffn_grad_hidden(
    grad_y,  # [N, DEPTH], contiguous rows
    grad_y_row,
    down,  # [BLOCKS * WIDTH, DEPTH], any strides
    down_unit,
    down_feature,
    grad_low,  # [N, rank], contiguous rows
    grad_low_row,
    down_A,  # [rank, BLOCKS * WIDTH], any strides
    down_A_rank,
    down_A_unit,
    rank,
    tokens,  # int32 [capacity]
    offsets,  # int32 [BLOCKS + 1]
    scale,  # [capacity]
    seed,
    threshold,  # of Philox, for the probability of being dropped
    kept,  # what a unit that is not dropped is multiplied by
    lora_seed,
    lora_threshold,
    lora_kept,
    pre,  # [UPS, capacity, WIDTH]
    grad_pre,  # [UPS, capacity, WIDTH]
    grad_scale,  # fp32 [column tiles, capacity]
    hidden,  # [capacity, WIDTH]
    capacity,
    row_tiles,
    UPS: tl.constexpr,
    GRAD_PRE: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
    ADAPTED: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    LORA_DROPOUT: tl.constexpr,
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
    # Entries of no list have no part in the result.
    if block == BLOCKS:
        if GRAD_SCALE:
            tl.store(grad_scale + column_tile.to(tl.int64) * capacity + row, tl.zeros((BLOCK_M,), tl.float32), mask=in_list)
        return

    token = tl.load(tokens + row, mask=in_list, other=0).to(tl.int64)
    first_unit = block.to(tl.int64) * WIDTH
    if GRAD_PRE or GRAD_SCALE:
        feature = tl.arange(0, BLOCK_K)
        grad_tile = grad_y + token[:, None] * grad_y_row + feature[None, :]
        down_tile = down + first_unit * down_unit + (unit[None, :] * down_unit + feature[:, None] * down_feature)
        grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, DEPTH, BLOCK_K):
            if DEPTH % BLOCK_K == 0:
                rows = tl.load(grad_tile)
                columns = tl.load(down_tile, mask=in_block[None, :], other=0.0)
            else:
                rows = tl.load(grad_tile, mask=feature[None, :] < DEPTH - k, other=0.0)
                columns = tl.load(down_tile, mask=in_block[None, :] & (feature[:, None] < DEPTH - k), other=0.0)
            grad = tl.dot(rows, columns, grad, input_precision=PRECISION)
            grad_tile += BLOCK_K
            down_tile += BLOCK_K * down_feature
        if ADAPTED and not LORA_DROPOUT:
            for r in tl.range(0, rank, BLOCK_R, num_stages=1):
                factor_lane = r + tl.arange(0, BLOCK_R)
                in_rank = factor_lane < rank
                low_rows = tl.load(grad_low + token[:, None] * grad_low_row + factor_lane[None, :], mask=in_rank[None, :], other=0.0)
                adapter = tl.load(
                    down_A + first_unit * down_A_unit + (unit[None, :] * down_A_unit + factor_lane[:, None] * down_A_rank),
                    mask=in_rank[:, None] & in_block[None, :],
                    other=0.0,
                )
                grad = tl.dot(low_rows, adapter, grad, input_precision=PRECISION)
        grad_part = {}
        grad_part[1] = grad
        # A binary tree: node j has the halves 2 * j and 2 * j + 1, so that the leaves are in order.
        for j in unroll(SLICES - 1):
            grad_part[2 * j + 2], grad_part[2 * j + 3] = halves(grad_part[j + 1])

    # Offsets within a tile fit in 32 bits; the tile's own place may not.
    place = first.to(tl.int64) * WIDTH
    plane = tl.cast(capacity, tl.int64) * WIDTH
    if SCALED:
        factor = tl.load(scale + row, mask=in_list, other=0.0).to(tl.float32)[:, None]
    if GRAD_SCALE:
        products = tl.zeros((BLOCK_M,), tl.float32)
    u, g = {}, {}
    for s in unroll(SLICES):
        lane = tl.arange(0, BLOCK_N // SLICES)
        part_first = column_tile * BLOCK_N + s * (BLOCK_N // SLICES)
        part_unit = part_first + lane
        in_part = part_unit < WIDTH
        inside = tl.arange(0, BLOCK_M)[:, None] * WIDTH + part_unit[None, :]
        stored = in_list[:, None] & in_part[None, :]
        drawn = token * (BLOCKS * WIDTH) + first_unit + part_first
        if GRAD_PRE or GRAD_SCALE:
            g_hidden = grad_part[SLICES + s]
            if ADAPTED and LORA_DROPOUT:
                # Dropout of the adapter's input acts on its part of the gradient only.
                through = tl.zeros((BLOCK_M, BLOCK_N // SLICES), tl.float32)
                for r in tl.range(0, rank, BLOCK_R, num_stages=1):
                    factor_lane = r + tl.arange(0, BLOCK_R)
                    in_rank = factor_lane < rank
                    low_rows = tl.load(grad_low + token[:, None] * grad_low_row + factor_lane[None, :], mask=in_rank[None, :], other=0.0)
                    adapter = tl.load(
                        down_A + first_unit * down_A_unit + (part_unit[None, :] * down_A_unit + factor_lane[:, None] * down_A_rank),
                        mask=in_rank[:, None] & in_part[None, :],
                        other=0.0,
                    )
                    through = tl.dot(low_rows, adapter, through, input_precision=PRECISION)
                if WIDTH % 4 == 0:
                    lora_keep = philox_keep_runs(lora_seed, drawn, lora_threshold, BLOCK_N // SLICES)
                else:
                    lora_keep = philox_keep(lora_seed, drawn[:, None] + lane[None, :], lora_threshold)
                g_hidden += tl.where(lora_keep, through * lora_kept, 0.0)
        if DROPOUT:
            if WIDTH % 4 == 0:
                keep = philox_keep_runs(seed, drawn, threshold, BLOCK_N // SLICES)
            else:
                keep = philox_keep(seed, drawn[:, None] + lane[None, :], threshold)
            if GRAD_PRE or GRAD_SCALE:
                g_hidden = tl.where(keep, g_hidden * kept, 0.0)
        for i in unroll(UPS):
            u[i] = tl.load(pre + (place + i * plane) + inside, mask=stored, other=0.0).to(tl.float32)
        if HIDDEN or GRAD_SCALE:
            a = activation(*u[:UPS])
        if GRAD_SCALE:
            # Units beyond the block have a gradient of 0 (their weights count as 0), but act(0) may be infinite.
            products += tl.sum(tl.where(in_part[None, :], g_hidden * a, 0.0), 1)
        if HIDDEN:
            h = a * factor if SCALED else a
            if DROPOUT:
                h = tl.where(keep, h * kept, 0.0)
            tl.store(hidden + place + inside, h.to(hidden.dtype.element_ty), mask=stored)
        if GRAD_PRE:
            scaled = g_hidden * factor if SCALED else g_hidden
            g[:UPS] = activation_backward(scaled, *u[:UPS])
            for i in unroll(UPS):
                tl.store(grad_pre + (place + i * plane) + inside, g[i].to(grad_pre.dtype.element_ty), mask=stored)
    if GRAD_SCALE:
        tl.store(grad_scale + column_tile.to(tl.int64) * capacity + row, products, mask=in_list)
