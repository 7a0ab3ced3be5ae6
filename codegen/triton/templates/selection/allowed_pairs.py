"""Which (tile of queries, block of keys) pairs hold a query that may see a key: by ranges where they decide, else by elements."""

import triton
import triton.language as tl

from sptc.codegen.triton.templates.language import allowed, holds_nowhere, holds_throughout, many


@triton.jit
def allowed_pairs(
    pairs_ptr, queries, keys, tiles, blocks, T: many("TENSORS"), T_STRIDE: many("STRIDES"), S: many("SIZES"), mask_ptr, mask_stride_b,
    mask_stride_h, mask_stride_q, mask_stride_k, bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PREDICATE: tl.constexpr, BY_RANGE: tl.constexpr, READS_TENSORS: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, BIAS_LEAST: tl.constexpr, TENSORS: tl.constexpr, STRIDES: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """pairs bool [1 or b, 1 or h_kv, tiles, blocks]: some head of the group allows some element of the pair.

    A program decides ROWS / TILE_ROWS tiles times COLUMNS / BLOCK_COLUMNS blocks. Elements are visited TILE_ROWS by BLOCK_COLUMNS of each
    pair at a time, and only until every pair has one.
    """
    tile_count: tl.constexpr = ROWS // TILE_ROWS
    block_count: tl.constexpr = COLUMNS // BLOCK_COLUMNS
    columns = tl.cdiv(blocks, block_count)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    first_tile = tl.program_id(0) // columns * tile_count
    first_block = tl.program_id(0) % columns * block_count
    tile = first_tile + tl.arange(0, tile_count)
    block = first_block + tl.arange(0, block_count)
    inside = (tile < tiles)[:, None] & (block < blocks)[None, :]
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    found = (~inside).to(tl.int32)
    for member in range(GROUP):
        h = head * GROUP + member
        if BY_RANGE:
            q_last = tl.minimum((first_tile + tile_count) * QUERY_BLOCK, queries) - 1
            k_last = tl.minimum((first_block + block_count) * KEY_BLOCK, keys) - 1
            open_range = ~holds_nowhere(batch, h, first_tile * QUERY_BLOCK, q_last, first_block * KEY_BLOCK, k_last, *S[:SIZES])
            if not (READS_TENSORS or MASK or BIAS):
                certain = holds_throughout(batch, h, first_tile * QUERY_BLOCK, q_last, first_block * KEY_BLOCK, k_last, *S[:SIZES])
                found = tl.where(certain, 1, found)
        else:
            open_range = True
        steps = tl.cdiv(KEY_BLOCK, BLOCK_COLUMNS)
        step = tl.where(open_range, 0, tl.cdiv(QUERY_BLOCK, TILE_ROWS) * steps)
        while (step < tl.cdiv(QUERY_BLOCK, TILE_ROWS) * steps) & (tl.min(tl.min(found, axis=1), axis=0) == 0):
            in_tile = step // steps * TILE_ROWS + row % TILE_ROWS
            in_block = step % steps * BLOCK_COLUMNS + column % BLOCK_COLUMNS
            q = ((first_tile + row // TILE_ROWS) * QUERY_BLOCK + in_tile)[:, None]
            k = ((first_block + column // BLOCK_COLUMNS) * KEY_BLOCK + in_block)[None, :]
            live = (in_tile < QUERY_BLOCK)[:, None] & (in_block < KEY_BLOCK)[None, :] & (q < queries) & (k < keys)
            keep = live
            if PREDICATE:
                keep = keep & allowed(batch, h, q, k, live, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES])
            if MASK:
                at = batch.to(tl.int64) * mask_stride_b + h.to(tl.int64) * mask_stride_h
                at = at + q.to(tl.int64) * mask_stride_q + k.to(tl.int64) * mask_stride_k
                keep = keep & tl.load(mask_ptr + at, mask=live, other=False).to(tl.int1)
            if BIAS:
                at = batch.to(tl.int64) * bias_stride_b + h.to(tl.int64) * bias_stride_h
                at = at + q.to(tl.int64) * bias_stride_q + k.to(tl.int64) * bias_stride_k
                keep = keep & (tl.load(bias_ptr + at, mask=live, other=0.0).to(tl.float32) > BIAS_LEAST)
            hits = tl.max(tl.reshape(keep.to(tl.int32), (ROWS, block_count, BLOCK_COLUMNS)), axis=2)
            found = found | tl.max(tl.reshape(hits, (tile_count, TILE_ROWS, block_count)), axis=1)
            step += 1
    base = (batch.to(tl.int64) * tl.num_programs(1) + head) * tiles
    tl.store(pairs_ptr + (base + tile)[:, None] * blocks + block[None, :], found != 0, mask=inside)
