"""Codeword histograms of tiles of queries or blocks of keys: how often each codeword of each sub-space is the nearest one."""

import triton
import triton.language as tl

from sptc.codegen.triton.templates.selection.codewords import nearest_codeword


@triton.jit
def encode_histogram(
    x_ptr, x_stride_b, x_stride_h, x_stride_n, x_stride_d, words_ptr, visible_ptr, visible_stride_b, visible_stride_h, histogram_ptr,
    length, runs, STEP: tl.constexpr, GROUP: tl.constexpr, SUBSPACES: tl.constexpr, CODEWORDS: tl.constexpr, SIZE: tl.constexpr,
    VISIBLE: tl.constexpr, ROWS: tl.constexpr, RUN_ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """histogram fp32 [b, h_kv, runs, SUBSPACES * CODEWORDS] of x [b, h_kv * GROUP, length, SUBSPACES * SIZE].

    A run is STEP vectors of each head of a group; the last one may be shorter. words fp32 [h_kv, SUBSPACES, CODEWORDS, SIZE], contiguous.
    visible bool [1 or b, 1 or h_kv, length]: vectors that count. A program takes ROWS rows at a time, RUN_ROWS of each of its runs.
    WORDS and WIDTH are CODEWORDS and SIZE padded to what a matrix product takes.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_run = tl.program_id(0).to(tl.int64) * (ROWS // RUN_ROWS)
    row = tl.arange(0, ROWS)
    run = first_run + row // RUN_ROWS
    word = tl.arange(0, WORDS)
    column = tl.arange(0, WIDTH)
    stored_run = first_run + tl.arange(0, ROWS // RUN_ROWS)
    for subspace in range(SUBSPACES):
        words = tl.load(
            words_ptr + ((head * SUBSPACES + subspace) * CODEWORDS + word[:, None]) * SIZE + column[None, :],
            mask=(word < CODEWORDS)[:, None] & (column < SIZE)[None, :],
            other=0.0,
        )
        counts = tl.zeros((ROWS // RUN_ROWS, WORDS), dtype=tl.float32)
        for member in range(GROUP):
            for start in range(0, STEP, RUN_ROWS):
                within = start + row % RUN_ROWS
                position = run * STEP + within
                live = (within < STEP) & (position < length)
                x = tl.load(
                    x_ptr
                    + batch * x_stride_b
                    + (head * GROUP + member) * x_stride_h
                    + position[:, None] * x_stride_n
                    + (subspace * SIZE + column)[None, :].to(tl.int64) * x_stride_d,
                    mask=live[:, None] & (column < SIZE)[None, :],
                    other=0.0,
                ).to(tl.float32)
                code = nearest_codeword(x, words, word < CODEWORDS, PRECISION)
                if VISIBLE:
                    live = live & tl.load(
                        visible_ptr + batch * visible_stride_b + head * visible_stride_h + position, mask=live, other=False
                    ).to(tl.int1)
                hot = ((code[:, None] == word[None, :]) & live[:, None]).to(tl.float32)
                counts += tl.sum(tl.reshape(hot, (ROWS // RUN_ROWS, RUN_ROWS, WORDS)), axis=1)
        offset = ((batch * tl.num_programs(1) + head) * runs + stored_run) * (SUBSPACES * CODEWORDS) + subspace * CODEWORDS
        tl.store(
            histogram_ptr + offset[:, None] + word[None, :],
            counts,
            mask=(stored_run < runs)[:, None] & (word < CODEWORDS)[None, :],
        )
