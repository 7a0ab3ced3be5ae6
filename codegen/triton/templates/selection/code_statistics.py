"""Codebook statistics: sums and counts of the sampled queries and keys that each codeword is nearest to."""

import triton
import triton.language as tl

from sptc.codegen.triton.templates.selection.codewords import nearest_codeword


@triton.jit
def code_statistics(
    q_ptr, q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_ptr, k_stride_b, k_stride_h, k_stride_n, k_stride_d, words_ptr,
    visible_ptr, visible_stride_b, visible_stride_h, sums_ptr, counts_ptr, batches, q_samples, q_step, k_samples, k_step,
    GROUP: tl.constexpr, SUBSPACES: tl.constexpr, CODEWORDS: tl.constexpr, SIZE: tl.constexpr, VISIBLE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums fp32 [h_kv, SUBSPACES, CODEWORDS, SIZE] and counts fp32 [h_kv, SUBSPACES, CODEWORDS].

    Queries 0, q_step, 2 * q_step, ... of each sequence count, q_samples of them, and visible keys likewise. A program adds up all samples
    of one sub-space of one key head in one order, so that the result is the same each time.
    """
    subspace = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS).to(tl.int64)
    word = tl.arange(0, WORDS)
    column = tl.arange(0, WIDTH)
    exists = word < CODEWORDS
    in_range = column < SIZE
    columns = (subspace * SIZE + column).to(tl.int64)
    words_at = ((head * SUBSPACES + subspace) * CODEWORDS + word[:, None]) * SIZE + column[None, :]
    words = tl.load(words_ptr + words_at, mask=exists[:, None] & in_range[None, :], other=0.0)
    sums = tl.zeros((WORDS, WIDTH), dtype=tl.float32)
    counts = tl.zeros((WORDS,), dtype=tl.float32)
    for start in range(0, batches * GROUP * q_samples, ROWS):
        sample = start + row
        live = sample < batches * GROUP * q_samples
        q_at = sample // (GROUP * q_samples) * q_stride_b + (head * GROUP + sample // q_samples % GROUP) * q_stride_h
        q_at += sample % q_samples * q_step * q_stride_n
        x = tl.load(q_ptr + q_at[:, None] + columns[None, :] * q_stride_d, mask=live[:, None] & in_range[None, :], other=0.0).to(tl.float32)
        hot = ((nearest_codeword(x, words, exists, PRECISION)[:, None] == word[None, :]) & live[:, None]).to(tl.float32)
        sums += tl.dot(tl.trans(hot), x, input_precision=PRECISION)
        counts += tl.sum(hot, axis=0)
    for start in range(0, batches * k_samples, ROWS):
        sample = start + row
        live = sample < batches * k_samples
        position = sample % k_samples * k_step
        k_at = sample // k_samples * k_stride_b + head * k_stride_h + position * k_stride_n
        x = tl.load(k_ptr + k_at[:, None] + columns[None, :] * k_stride_d, mask=live[:, None] & in_range[None, :], other=0.0).to(tl.float32)
        if VISIBLE:
            visible_at = sample // k_samples * visible_stride_b + head * visible_stride_h + position
            live = live & tl.load(visible_ptr + visible_at, mask=live, other=False).to(tl.int1)
        hot = ((nearest_codeword(x, words, exists, PRECISION)[:, None] == word[None, :]) & live[:, None]).to(tl.float32)
        sums += tl.dot(tl.trans(hot), x, input_precision=PRECISION)
        counts += tl.sum(hot, axis=0)
    tl.store(sums_ptr + words_at, sums, mask=exists[:, None] & in_range[None, :])
    tl.store(counts_ptr + (head * SUBSPACES + subspace) * CODEWORDS + word, counts, mask=exists)
