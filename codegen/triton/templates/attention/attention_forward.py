"""Block-sparse attention: softmax(scale q k^T + mask) v over the key blocks that each tile of queries keeps."""

import triton
import triton.language as tl

from sptc.codegen.triton.templates.attention.philox import philox_keep, philox_keep_runs
from sptc.codegen.triton.templates.attention.rows import keys_of_step, load_rows, masked, places, program_of_list, rectangle
from sptc.codegen.triton.templates.language import many, transformed


@triton.jit
def attention_forward(
    q_ptr, q_stride_b, q_stride_h, q_stride_n, k_ptr, k_stride_b, k_stride_h, k_stride_m, v_ptr, v_stride_b, v_stride_h, v_stride_m,
    out_ptr, out_stride_b, out_stride_h, out_stride_n, lse_ptr, ids_ptr, counts_ptr,
    T: many("TENSORS"), T_STRIDE: many("STRIDES"), S: many("SIZES"),
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    seed_ptr, threshold, keep_scale, scale, scale_log2, h_kv, n, m, tiles, width,
    GROUP: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_KEYS: tl.constexpr,
    SCALE_FIRST: tl.constexpr, TRANSFORM: tl.constexpr, TENSORS: tl.constexpr, STRIDES: tl.constexpr, SIZES: tl.constexpr,
    PREDICATE: tl.constexpr, READS_TENSORS: tl.constexpr, SKIP_TEST: tl.constexpr, MASK: tl.constexpr, MASK_BY_ROW: tl.constexpr,
    BIAS: tl.constexpr, BIAS_BY_ROW: tl.constexpr, BIAS_LEAST: tl.constexpr, DROPOUT: tl.constexpr, DROPOUT_IN_RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [b, h, n, VALUE_DIM] and lse [b, h, n] (natural logarithm; -inf for a row without keys, whose output is zeros).

    A program computes BLOCK_M rows of one tile. Keys come BLOCK_N at a time through the tile's list ids [b, h_kv, tiles, width], of which
    the first counts [b, h_kv, tiles] entries count. The softmax is online and in powers of two: scale_log2 is scale * log2(e).
    """
    ROWS: tl.constexpr = GROUP * QUERY_BLOCK
    STEPS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N

    b, key_head, tile, list_index, first_row = program_of_list(h_kv, tiles)
    listed = first_row + tl.arange(0, BLOCK_M) < ROWS
    row = tl.minimum(first_row + tl.arange(0, BLOCK_M), ROWS - 1)
    head, position, row_live, row_index = places(b, key_head, tile, row, listed, h_kv, n)
    first_head, q_first, q_last = rectangle(key_head, tile, first_row, n)

    values = tl.arange(0, BLOCK_V)
    batch = b.to(tl.int64)
    q_row = q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h + position.to(tl.int64) * q_stride_n
    q = load_rows(q_row[:, None], 0, HEAD_DIM, BLOCK_D)
    k_start = k_ptr + batch * k_stride_b + key_head.to(tl.int64) * k_stride_h
    v_start = v_ptr + batch * v_stride_b + key_head.to(tl.int64) * v_stride_h
    list_start = ids_ptr + list_index.to(tl.int64) * width
    count = tl.load(counts_ptr + list_index)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for step in range(0, count * STEPS if KEY_BLOCK >= BLOCK_N else (count * KEY_BLOCK + BLOCK_N - 1) // BLOCK_N):
        key, key_live, k_first, key_row, k_base, v_base = keys_of_step(step, list_start, count, k_start, k_stride_m, v_start, v_stride_m, m)
        k = load_rows(k_base, key_row * k_stride_m, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TRANSFORM:
            scores = transformed(scores * scale) * 1.4426950408889634
        elif SCALE_FIRST:
            scores = scores * scale_log2
        scores = masked(
            scores, b, first_head, head[:, None], position[:, None], key[None, :], q_first, q_last, k_first, m,
            mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
            bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES],
        )  # fmt: skip
        if not EVEN_KEYS:
            scores = tl.where(key_live[None, :], scores, float("-inf"))

        # A row that has met no key yet has maximum -inf; subtracting 0 in its place keeps NaN out.
        if SCALE_FIRST:
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = tl.exp2(scores - base[:, None])
        else:
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(weights, 1)
        maximum = new_maximum
        if DROPOUT:
            if DROPOUT_IN_RUNS:
                survives = philox_keep_runs(seed_ptr, row_index * m + k_first, threshold, BLOCK_N)
            else:
                survives = philox_keep(seed_ptr, row_index[:, None] * m + key[None, :], threshold)
            weights = tl.where(survives, weights, 0.0)
        v = load_rows(v_base, key_row * v_stride_m, VALUE_DIM, BLOCK_V)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    total = tl.where(total > 0.0, total, 1.0)
    if DROPOUT:
        acc = acc * (keep_scale / total)[:, None]
    else:
        acc = acc / total[:, None]
    tl.store(lse_ptr + row_index, (maximum + tl.log2(total)) * 0.6931471805599453, mask=row_live)
    out_live = row_live[:, None] & (values < VALUE_DIM)[None, :]
    out_row = out_ptr + batch * out_stride_b + head.to(tl.int64) * out_stride_h + position.to(tl.int64) * out_stride_n
    tl.store(out_row[:, None] + values[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_live)
