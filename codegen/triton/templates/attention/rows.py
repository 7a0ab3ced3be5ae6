"""What the kernels of sparse attention share: their rows, the keys of a list, loads of features, and the mask.

Rows of a tile are the QUERY_BLOCK queries of each of the GROUP query heads that share its key head. Rows and keys that do not exist read
what the last that exists reads, so that loads need no mask.
"""

# ruff: noqa: F821  (names in capitals are constants of the spec)

import triton
import triton.language as tl

from sptc.codegen.triton.templates.language import allowed, allowed_by_positions, allowed_by_tensors, holds_throughout, many


@triton.jit
def program_of_list(h_kv, tiles):
    """(b, key head, tile, list, first row in the tile) of this program, which takes BLOCK_M rows of a tile and walks the tile's list.

    Programs of one list are neighbours, and so are lists of one key head: what they share stays in the cache.
    """
    CHUNKS: tl.constexpr = (GROUP * QUERY_BLOCK + BLOCK_M - 1) // BLOCK_M
    list_index = tl.program_id(0) // CHUNKS
    return list_index // tiles // h_kv, list_index // tiles % h_kv, list_index % tiles, list_index, tl.program_id(0) % CHUNKS * BLOCK_M


@triton.jit
def places(b, key_head, tile, row, listed, h_kv, n):
    """(head, query position, whether it exists, number in [b, h, n]) of rows of tiles. `listed`: bool, which rows are of the tile."""
    head = key_head * GROUP + row // QUERY_BLOCK
    position = tile * QUERY_BLOCK + row % QUERY_BLOCK
    live = listed & (position < n)
    position = tl.minimum(position, n - 1)
    return head, position, live, (b * h_kv * GROUP + head).to(tl.int64) * n + position


@triton.jit
def rectangle(key_head, tile, first_row, n):
    """(first head, first query, last query) of BLOCK_M rows of one tile from `first_row` on."""
    ONE_HEAD: tl.constexpr = GROUP == 1 or QUERY_BLOCK % BLOCK_M == 0
    q_first = tile * QUERY_BLOCK + (first_row % QUERY_BLOCK if ONE_HEAD else 0)
    q_last = tl.minimum(q_first + (min(BLOCK_M, QUERY_BLOCK) if ONE_HEAD else QUERY_BLOCK), n) - 1
    return key_head * GROUP + first_row // QUERY_BLOCK, q_first, q_last


@triton.jit
def keys_of_step(step, list_start, count, k_start, k_stride_m, v_start, v_stride_m, m):
    """Keys [BLOCK_N] of a step through a list: (key, whether it exists, first key, row [BLOCK_N, 1] from the bases of k and v, both bases).

    Where BLOCK_N takes several blocks there is no first key: it is 0.
    """
    columns = tl.arange(0, BLOCK_N)
    if KEY_BLOCK >= BLOCK_N:
        # A part of one block.
        STEPS: tl.constexpr = (KEY_BLOCK + BLOCK_N - 1) // BLOCK_N
        within = step % STEPS * BLOCK_N
        k_first = tl.load(list_start + step // STEPS) * KEY_BLOCK + within
        key = k_first + columns
        live = columns < tl.minimum(KEY_BLOCK - within, m - k_first)
    else:
        # Several blocks at once: column c of the list lies in its block c // KEY_BLOCK.
        column = step * BLOCK_N + columns
        listed = column < count * KEY_BLOCK
        k_first = 0
        key = tl.load(list_start + column // KEY_BLOCK, mask=listed, other=0) * KEY_BLOCK + column % KEY_BLOCK
        live = listed & (key < m)
    if EVEN_KEYS:
        # Addresses are one scalar apart from those of the step before.
        first = k_first.to(tl.int64)
        return key, live, k_first, columns.to(tl.int64)[:, None], k_start + first * k_stride_m, v_start + first * v_stride_m
    key = tl.minimum(key, m - 1)
    return key, live, k_first, key.to(tl.int64)[:, None], k_start, v_start


@triton.jit
def load_rows(base, offset, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of SIZE features at base + offset (one of them [rows, 1]), as [rows, BLOCK]: zeros from SIZE on."""
    features = tl.arange(0, BLOCK)[None, :]
    if SIZE == BLOCK:
        return tl.load(base + (offset + features))
    else:
        return tl.load(base + (offset + features), mask=features < SIZE, other=0.0)


@triton.jit
def masked(
    scores, b, first_head, head, q, k, q_first, q_last, k_first, m, mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, T: many("TENSORS"), T_STRIDE: many("STRIDES"), S: many("SIZES"),
):  # fmt: skip
    """Scores in powers of two with the bias added, -inf where the mask hides them. head, q and k (positions) broadcast to the scores."""
    ONE_HEAD: tl.constexpr = GROUP == 1 or QUERY_BLOCK % BLOCK_M == 0
    exists = tl.full([1, 1], 1, tl.int1)
    h = first_head if ONE_HEAD else head
    if BIAS:
        row = b.to(tl.int64) * bias_stride_b + (
            head.to(tl.int64) * bias_stride_h + q.to(tl.int64) * bias_stride_q if BIAS_BY_ROW else first_head.to(tl.int64) * bias_stride_h
        )
        bias = tl.load(bias_ptr + row + k.to(tl.int64) * bias_stride_k).to(tl.float32)
        scores = tl.where(bias > BIAS_LEAST, scores + bias * 1.4426950408889634, float("-inf"))
    if MASK:
        row = b.to(tl.int64) * mask_stride_b + (
            head.to(tl.int64) * mask_stride_h + q.to(tl.int64) * mask_stride_q if MASK_BY_ROW else first_head.to(tl.int64) * mask_stride_h
        )
        scores = tl.where(tl.load(mask_ptr + row + k.to(tl.int64) * mask_stride_k), scores, float("-inf"))
    if SKIP_TEST:
        # Conjuncts that read no tensor are known for a whole block at once, as a rule. The others are tested before the branch:
        # where each of its sides loads, Triton 3.6 can't compile the pipelined loop for sm_90.
        k_last = tl.minimum(k_first + min(BLOCK_N, KEY_BLOCK), m) - 1
        if READS_TENSORS:
            shown = allowed_by_tensors(b, h, q, k, exists, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES])
            scores = tl.where(shown, scores, float("-inf"))
        if not holds_throughout(b, first_head, q_first, q_last, k_first, k_last, *S[:SIZES]):
            keep = allowed_by_positions(b, h, q, k, exists, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES])
            scores = tl.where(keep, scores, float("-inf"))
    elif PREDICATE:
        keep = allowed(b, h, q, k, exists, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES])
        scores = tl.where(keep, scores, float("-inf"))
    return scores
