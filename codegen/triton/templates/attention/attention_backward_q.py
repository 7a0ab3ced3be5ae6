"""Block-sparse attention, backward to the queries: by the lists of the forward pass."""

import triton
import triton.language as tl

from sptc.codegen.triton.templates.attention.philox import philox_keep, philox_keep_runs
from sptc.codegen.triton.templates.attention.rows import keys_of_step, load_rows, masked, places, program_of_list, rectangle
from sptc.codegen.triton.templates.language import many, transform_slope, transformed


@triton.jit
def attention_backward_q(
    q_ptr, q_stride_b, q_stride_h, q_stride_n, k_ptr, k_stride_b, k_stride_h, k_stride_m, v_ptr, v_stride_b, v_stride_h, v_stride_m,
    grad_out_ptr, grad_out_stride_b, grad_out_stride_h, grad_out_stride_n, out_ptr, out_stride_b, out_stride_h, out_stride_n,
    lse_ptr, delta_ptr, grad_q_ptr, grad_q_stride_b, grad_q_stride_h, grad_q_stride_n, ids_ptr, counts_ptr,
    T: many("TENSORS"), T_STRIDE: many("STRIDES"), S: many("SIZES"),
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    seed_ptr, threshold, keep_scale, scale, scale_log2, h_kv, n, m, tiles, width,
    NEED_Q: tl.constexpr, GROUP: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_KEYS: tl.constexpr, TENSORS: tl.constexpr, STRIDES: tl.constexpr, SIZES: tl.constexpr, PREDICATE: tl.constexpr,
    READS_TENSORS: tl.constexpr, SKIP_TEST: tl.constexpr, MASK: tl.constexpr, MASK_BY_ROW: tl.constexpr, BIAS: tl.constexpr,
    BIAS_BY_ROW: tl.constexpr, BIAS_LEAST: tl.constexpr, DROPOUT: tl.constexpr, DROPOUT_IN_RUNS: tl.constexpr, PRECISION: tl.constexpr,
    TRANSFORM: tl.constexpr,
):  # fmt: skip
    """delta [b, h, n], the sum of out * grad_out over features, and grad_q [b, h, n, HEAD_DIM] where it is needed.

    Rows, tiles and lists are those of the forward pass. The weights are computed anew from lse, so no row maximum is sought:
    grad_scores = weights * (grad_weights - delta), grad_q = scale * grad_scores k.
    """
    ROWS: tl.constexpr = GROUP * QUERY_BLOCK
    STEPS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N

    b, key_head, tile, list_index, first_row = program_of_list(h_kv, tiles)
    listed = first_row + tl.arange(0, BLOCK_M) < ROWS
    row = tl.minimum(first_row + tl.arange(0, BLOCK_M), ROWS - 1)
    head, position, row_live, row_index = places(b, key_head, tile, row, listed, h_kv, n)

    batch = b.to(tl.int64)
    grad_row = grad_out_ptr + batch * grad_out_stride_b + head.to(tl.int64) * grad_out_stride_h + position.to(tl.int64) * grad_out_stride_n
    grad_out = load_rows(grad_row[:, None], 0, VALUE_DIM, BLOCK_V)
    out_row = out_ptr + batch * out_stride_b + head.to(tl.int64) * out_stride_h + position.to(tl.int64) * out_stride_n
    out = load_rows(out_row[:, None], 0, VALUE_DIM, BLOCK_V)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + row_index, delta, mask=row_live)

    if NEED_Q:
        first_head, q_first, q_last = rectangle(key_head, tile, first_row, n)
        features = tl.arange(0, BLOCK_D)
        q_row = q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h + position.to(tl.int64) * q_stride_n
        q = load_rows(q_row[:, None], 0, HEAD_DIM, BLOCK_D)
        k_start = k_ptr + batch * k_stride_b + key_head.to(tl.int64) * k_stride_h
        v_start = v_ptr + batch * v_stride_b + key_head.to(tl.int64) * v_stride_h

        # A row without keys has lse -inf; +inf in its place makes all its weights 0.
        lse = tl.load(lse_ptr + row_index)
        lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        list_start = ids_ptr + list_index.to(tl.int64) * width
        count = tl.load(counts_ptr + list_index)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for step in range(0, count * STEPS if KEY_BLOCK >= BLOCK_N else (count * KEY_BLOCK + BLOCK_N - 1) // BLOCK_N):
            key, key_live, k_first, key_row, k_base, v_base = keys_of_step(
                step, list_start, count, k_start, k_stride_m, v_start, v_stride_m, m
            )
            k = load_rows(k_base, key_row * k_stride_m, HEAD_DIM, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if TRANSFORM:
                slope = transform_slope(scores * scale)
                scores = transformed(scores * scale) * 1.4426950408889634
            else:
                scores = scores * scale_log2
            scores = masked(
                scores, b, first_head, head[:, None], position[:, None], key[None, :], q_first, q_last, k_first, m,
                mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
                bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES],
            )  # fmt: skip
            if not EVEN_KEYS:
                scores = tl.where(key_live[None, :], scores, float("-inf"))

            weights = tl.exp2(scores - lse_log2[:, None])
            v = load_rows(v_base, key_row * v_stride_m, VALUE_DIM, BLOCK_V)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                if DROPOUT_IN_RUNS:
                    survives = philox_keep_runs(seed_ptr, row_index * m + k_first, threshold, BLOCK_N)
                else:
                    survives = philox_keep(seed_ptr, row_index[:, None] * m + key[None, :], threshold)
                grad_weights = tl.where(survives, grad_weights * keep_scale, 0.0)
            grad_scores = weights * (grad_weights - delta[:, None])
            if TRANSFORM:
                grad_scores = grad_scores * slope
            acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)

        grad_q = (acc * scale).to(grad_q_ptr.dtype.element_ty)
        q_live = row_live[:, None] & (features < HEAD_DIM)[None, :]
        grad_row = grad_q_ptr + batch * grad_q_stride_b + head.to(tl.int64) * grad_q_stride_h + position.to(tl.int64) * grad_q_stride_n
        tl.store(grad_row[:, None] + features[None, :], grad_q, mask=q_live)
