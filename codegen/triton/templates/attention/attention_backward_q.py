"""Block-sparse attention, backward to the queries: by the lists of the forward pass."""

import triton
import triton.language as tl

from sptc.codegen.triton.templates.attention.philox import philox_keep, philox_keep_runs
from sptc.codegen.triton.templates.language import allowed, allowed_by_positions, allowed_by_tensors, holds_throughout, many


@triton.jit
def attention_backward_q(
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_m,
    v_ptr,
    v_stride_b,
    v_stride_h,
    v_stride_m,
    grad_out_ptr,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_n,
    out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    ids_ptr,
    counts_ptr,
    T: many("TENSORS"),
    T_STRIDE: many("STRIDES"),
    S: many("SIZES"),
    mask_ptr,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    bias_ptr,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    seed_ptr,
    threshold,
    keep_scale,
    scale,
    scale_log2,
    h_kv,
    n,
    m,
    tiles,
    width,
    NEED_Q: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    TENSORS: tl.constexpr,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    PREDICATE: tl.constexpr,
    READS_TENSORS: tl.constexpr,
    SKIP_TEST: tl.constexpr,
    MASK: tl.constexpr,
    MASK_BY_ROW: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_BY_ROW: tl.constexpr,
    BIAS_LEAST: tl.constexpr,
    DROPOUT: tl.constexpr,
    DROPOUT_IN_RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta [b, h, n], the sum of out * grad_out over features, and grad_q [b, h, n, HEAD_DIM] where it is needed.

    Rows, tiles and lists are those of the forward pass. The weights are computed anew from lse, so no row maximum is sought:
    grad_scores = weights * (grad_weights - delta), grad_q = scale * grad_scores k.
    """
    ROWS: tl.constexpr = GROUP * QUERY_BLOCK
    CHUNKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    ONE_HEAD: tl.constexpr = GROUP == 1 or QUERY_BLOCK % BLOCK_M == 0
    WHOLE: tl.constexpr = KEY_BLOCK >= BLOCK_N
    STEPS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N

    # Programs of one list are neighbours, and so are lists of one key head: what they share stays in the cache.
    chunk = tl.program_id(0) % CHUNKS
    list_index = tl.program_id(0) // CHUNKS
    tile = list_index % tiles
    key_head = list_index // tiles % h_kv
    b = list_index // tiles // h_kv

    # Rows and keys that do not exist read what the last that exists reads, so that loads need no mask.
    row = tl.minimum(chunk * BLOCK_M + tl.arange(0, BLOCK_M), ROWS - 1)
    head = key_head * GROUP + row // QUERY_BLOCK
    position = tile * QUERY_BLOCK + row % QUERY_BLOCK
    row_live = (chunk * BLOCK_M + tl.arange(0, BLOCK_M) < ROWS) & (position < n)
    position = tl.minimum(position, n - 1)
    row_index = (b * h_kv * GROUP + head).to(tl.int64) * n + position

    values = tl.arange(0, BLOCK_V)
    batch = b.to(tl.int64)
    value_live = (values < VALUE_DIM)[None, :]
    grad_row = grad_out_ptr + batch * grad_out_stride_b + head.to(tl.int64) * grad_out_stride_h + position.to(tl.int64) * grad_out_stride_n
    grad_out = tl.load(grad_row[:, None] + values[None, :], mask=value_live, other=0.0)
    out = tl.load(out_ptr + row_index[:, None] * VALUE_DIM + values[None, :], mask=value_live, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + row_index, delta, mask=row_live)

    if NEED_Q:
        first_head = key_head * GROUP + chunk * BLOCK_M // QUERY_BLOCK
        h = first_head if ONE_HEAD else head[:, None]
        q_first = tile * QUERY_BLOCK + (chunk * BLOCK_M % QUERY_BLOCK if ONE_HEAD else 0)
        q_last = tl.minimum(q_first + (min(BLOCK_M, QUERY_BLOCK) if ONE_HEAD else QUERY_BLOCK), n) - 1

        columns = tl.arange(0, BLOCK_N)
        exists = tl.full([1, 1], 1, tl.int1)
        features = tl.arange(0, BLOCK_D)
        q_row = q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h + position.to(tl.int64) * q_stride_n
        q = tl.load(q_row[:, None] + features[None, :], mask=(features < HEAD_DIM)[None, :], other=0.0)
        k_start = k_ptr + batch * k_stride_b + key_head.to(tl.int64) * k_stride_h
        v_start = v_ptr + batch * v_stride_b + key_head.to(tl.int64) * v_stride_h
        if MASK_BY_ROW:
            mask_row = (batch * mask_stride_b + head.to(tl.int64) * mask_stride_h + position.to(tl.int64) * mask_stride_q)[:, None]
        else:
            mask_row = batch * mask_stride_b + first_head.to(tl.int64) * mask_stride_h
        if BIAS_BY_ROW:
            bias_row = (batch * bias_stride_b + head.to(tl.int64) * bias_stride_h + position.to(tl.int64) * bias_stride_q)[:, None]
        else:
            bias_row = batch * bias_stride_b + first_head.to(tl.int64) * bias_stride_h

        # A row without keys has lse -inf; +inf in its place makes all its weights 0.
        lse = tl.load(lse_ptr + row_index)
        lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        list_start = ids_ptr + list_index.to(tl.int64) * width
        count = tl.load(counts_ptr + list_index)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for step in range(0, count * STEPS if WHOLE else (count * KEY_BLOCK + BLOCK_N - 1) // BLOCK_N):
            if WHOLE:
                # A part of one block.
                within = step % STEPS * BLOCK_N
                k_first = tl.load(list_start + step // STEPS) * KEY_BLOCK + within
                key_live = columns < tl.minimum(KEY_BLOCK - within, m - k_first)
            else:
                # Several blocks at once: column c of the list lies in its block c // KEY_BLOCK.
                column = step * BLOCK_N + columns
                listed = column < count * KEY_BLOCK
                key = tl.load(list_start + column // KEY_BLOCK, mask=listed, other=0) * KEY_BLOCK + column % KEY_BLOCK
                key_live = listed & (key < m)
            if EVEN_KEYS:
                # Addresses are one scalar apart from those of the step before.
                key = k_first + columns
                k_base = k_start + k_first.to(tl.int64) * k_stride_m
                v_base = v_start + k_first.to(tl.int64) * v_stride_m
                key_row = columns.to(tl.int64)[:, None]
            else:
                key = tl.minimum(k_first + columns if WHOLE else key, m - 1)
                k_base = k_start
                v_base = v_start
                key_row = key.to(tl.int64)[:, None]
            if HEAD_DIM == BLOCK_D:
                k = tl.load(k_base + (key_row * k_stride_m + features[None, :]))
            else:
                k = tl.load(k_base + (key_row * k_stride_m + features[None, :]), mask=(features < HEAD_DIM)[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2

            if BIAS:
                bias = tl.load(bias_ptr + bias_row + key.to(tl.int64)[None, :] * bias_stride_k).to(tl.float32)
                scores = tl.where(bias > BIAS_LEAST, scores + bias * 1.4426950408889634, float("-inf"))
            if MASK:
                keep = tl.load(mask_ptr + mask_row + key.to(tl.int64)[None, :] * mask_stride_k)
                scores = tl.where(keep, scores, float("-inf"))
            if SKIP_TEST:
                # Conjuncts that read no tensor are known for a whole block at once, as a rule. The others are tested before the branch:
                # where each of its sides loads, Triton 3.6 can't compile the pipelined loop for sm_90.
                k_last = tl.minimum(k_first + min(BLOCK_N, KEY_BLOCK), m) - 1
                if READS_TENSORS:
                    scores = tl.where(
                        allowed_by_tensors(b, h, position[:, None], key[None, :], exists, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES]),
                        scores,
                        float("-inf"),
                    )
                if not holds_throughout(b, first_head, q_first, q_last, k_first, k_last, *S[:SIZES]):
                    scores = tl.where(
                        allowed_by_positions(b, h, position[:, None], key[None, :], exists, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES]),
                        scores,
                        float("-inf"),
                    )
            elif PREDICATE:
                scores = tl.where(
                    allowed(b, h, position[:, None], key[None, :], exists, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES]),
                    scores,
                    float("-inf"),
                )
            if not EVEN_KEYS:
                scores = tl.where(key_live[None, :], scores, float("-inf"))

            weights = tl.exp2(scores - lse_log2[:, None])
            if VALUE_DIM == BLOCK_V:
                v = tl.load(v_base + (key_row * v_stride_m + values[None, :]))
            else:
                v = tl.load(v_base + (key_row * v_stride_m + values[None, :]), mask=(values < VALUE_DIM)[None, :], other=0.0)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                if DROPOUT_IN_RUNS:
                    survives = philox_keep_runs(seed_ptr, row_index * m + k_first, threshold, BLOCK_N)
                else:
                    survives = philox_keep(seed_ptr, row_index[:, None] * m + key[None, :], threshold)
                grad_weights = tl.where(survives, grad_weights * keep_scale, 0.0)
            grad_scores = weights * (grad_weights - delta[:, None])
            acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)

        grad_q = (acc * scale).to(grad_q_ptr.dtype.element_ty)
        q_live = row_live[:, None] & (features < HEAD_DIM)[None, :]
        tl.store(grad_q_ptr + row_index[:, None] * HEAD_DIM + features[None, :], grad_q, mask=q_live)
