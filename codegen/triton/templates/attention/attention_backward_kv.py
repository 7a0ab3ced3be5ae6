"""Block-sparse attention, backward to keys and values: by inverted lists, so that no two programs write the same sum."""

import triton
import triton.language as tl

from sptc.codegen.triton.templates.attention.philox import philox_keep, philox_keep_runs
from sptc.codegen.triton.templates.attention.rows import load_rows, masked, places, rectangle
from sptc.codegen.triton.templates.language import many, transform_slope, transformed


@triton.jit
def attention_backward_kv(
    q_ptr, q_stride_b, q_stride_h, q_stride_n, k_ptr, k_stride_b, k_stride_h, k_stride_m, v_ptr, v_stride_b, v_stride_h, v_stride_m,
    grad_out_ptr, grad_out_stride_b, grad_out_stride_h, grad_out_stride_n, lse_ptr, delta_ptr,
    grad_k_ptr, grad_k_stride_b, grad_k_stride_h, grad_k_stride_m, grad_v_ptr, grad_v_stride_b, grad_v_stride_h, grad_v_stride_m,
    tiles_ptr, offsets_ptr, T: many("TENSORS"), T_STRIDE: many("STRIDES"), S: many("SIZES"),
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    seed_ptr, threshold, keep_scale, scale, scale_log2, h_kv, n, m, blocks, capacity,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, GROUP: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_QUERIES: tl.constexpr, TENSORS: tl.constexpr, STRIDES: tl.constexpr, SIZES: tl.constexpr,
    PREDICATE: tl.constexpr, READS_TENSORS: tl.constexpr, SKIP_TEST: tl.constexpr, MASK: tl.constexpr, MASK_BY_ROW: tl.constexpr,
    BIAS: tl.constexpr, BIAS_BY_ROW: tl.constexpr, BIAS_LEAST: tl.constexpr, DROPOUT: tl.constexpr, DROPOUT_IN_RUNS: tl.constexpr,
    PRECISION: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """grad_k [b, h_kv, m, HEAD_DIM] and grad_v [b, h_kv, m, VALUE_DIM], each where it is needed.

    A program computes BLOCK_N keys of one block, over all query heads of the group. The tiles that keep block j of key head (b, i) are
    tiles[b, i, offsets[b, i, j] : offsets[b, i, j + 1]], tiles being [b, h_kv, capacity] and offsets [b, h_kv, blocks + 1]. Their rows
    come BLOCK_M at a time; scores are transposed, [BLOCK_N, BLOCK_M].
    """
    ROWS: tl.constexpr = GROUP * QUERY_BLOCK
    CHUNKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    WHOLE: tl.constexpr = ROWS >= BLOCK_M
    PARTS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N

    within = tl.program_id(0) % PARTS * BLOCK_N
    block = tl.program_id(0) // PARTS % blocks
    pair = tl.program_id(0) // PARTS // blocks
    key_head = pair % h_kv
    b = pair // h_kv

    columns = tl.arange(0, BLOCK_N)
    k_first = block * KEY_BLOCK + within
    key_live = columns < tl.minimum(KEY_BLOCK - within, m - k_first)
    key = tl.minimum(k_first + columns, m - 1)

    features = tl.arange(0, BLOCK_D)
    values = tl.arange(0, BLOCK_V)
    batch = b.to(tl.int64)
    k_row = k_ptr + batch * k_stride_b + key_head.to(tl.int64) * k_stride_h + key.to(tl.int64) * k_stride_m
    k = load_rows(k_row[:, None], 0, HEAD_DIM, BLOCK_D)
    if NEED_K:
        v_row = v_ptr + batch * v_stride_b + key_head.to(tl.int64) * v_stride_h + key.to(tl.int64) * v_stride_m
        v = load_rows(v_row[:, None], 0, VALUE_DIM, BLOCK_V)

    offset = offsets_ptr + pair.to(tl.int64) * (blocks + 1) + block
    start = tl.load(offset)
    kept = tl.load(offset + 1) - start
    list_start = tiles_ptr + pair.to(tl.int64) * capacity + start
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for step in range(0, kept * CHUNKS if WHOLE else (kept * ROWS + BLOCK_M - 1) // BLOCK_M):
        if WHOLE:
            # Rows of one tile.
            first_row = step % CHUNKS * BLOCK_M
            tile = tl.load(list_start + step // CHUNKS)
            row = first_row + tl.arange(0, BLOCK_M)
            listed = row < ROWS
            row = tl.minimum(row, ROWS - 1)
            first_head, q_first, q_last = rectangle(key_head, tile, first_row, n)
        else:
            # Several tiles at once: row r of the list lies in its tile r // ROWS.
            row = step * BLOCK_M + tl.arange(0, BLOCK_M)
            listed = row < kept * ROWS
            tile = tl.load(list_start + row // ROWS, mask=listed, other=0)
            row = row % ROWS
            first_head = key_head * GROUP
        head, position, row_live, row_index = places(b, key_head, tile, row, listed, h_kv, n)
        q_row = q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h + position.to(tl.int64) * q_stride_n
        q = load_rows(q_row[:, None], 0, HEAD_DIM, BLOCK_D)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if TRANSFORM:
            slope = transform_slope(scores * scale)
            scores = transformed(scores * scale) * 1.4426950408889634
        else:
            scores = scores * scale_log2
        scores = masked(
            scores, b, first_head, head[None, :], position[None, :], key[:, None], q_first, q_last, k_first, m,
            mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
            bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES],
        )  # fmt: skip

        # A row without keys has lse -inf; +inf in its place makes all its weights 0.
        lse = tl.load(lse_ptr + row_index)
        if not EVEN_QUERIES:
            lse = tl.where(row_live, lse, float("-inf"))
        lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        weights = tl.exp2(scores - lse_log2[None, :])
        grad_row = (
            grad_out_ptr + batch * grad_out_stride_b + head.to(tl.int64) * grad_out_stride_h + position.to(tl.int64) * grad_out_stride_n
        )
        grad_out = load_rows(grad_row[:, None], 0, VALUE_DIM, BLOCK_V)
        if DROPOUT:
            if DROPOUT_IN_RUNS:
                survives = tl.trans(philox_keep_runs(seed_ptr, row_index * m + k_first, threshold, BLOCK_N))
            else:
                survives = philox_keep(seed_ptr, row_index[None, :] * m + key[:, None], threshold)
        if NEED_V:
            if DROPOUT:
                dropped = tl.where(survives, weights * keep_scale, 0.0)
            else:
                dropped = weights
            grad_v = tl.dot(dropped.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        if NEED_K:
            delta = tl.load(delta_ptr + row_index)
            grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
            if DROPOUT:
                grad_weights = tl.where(survives, grad_weights * keep_scale, 0.0)
            grad_scores = weights * (grad_weights - delta[None, :])
            if TRANSFORM:
                grad_scores = grad_scores * slope
            grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)

    k_live = key_live[:, None] & (features < HEAD_DIM)[None, :]
    v_live = key_live[:, None] & (values < VALUE_DIM)[None, :]
    if NEED_K:
        grad_k_row = grad_k_ptr + batch * grad_k_stride_b + key_head.to(tl.int64) * grad_k_stride_h + key.to(tl.int64) * grad_k_stride_m
        tl.store(grad_k_row[:, None] + features[None, :], (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=k_live)
    if NEED_V:
        grad_v_row = grad_v_ptr + batch * grad_v_stride_b + key_head.to(tl.int64) * grad_v_stride_h + key.to(tl.int64) * grad_v_stride_m
        tl.store(grad_v_row[:, None] + values[None, :], grad_v.to(grad_v_ptr.dtype.element_ty), mask=v_live)
