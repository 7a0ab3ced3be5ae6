"""Means of runs of queries."""

import triton
import triton.language as tl


@triton.jit
def run_means(
    q_ptr, q_stride_b, q_stride_h, q_stride_n, q_stride_d, means_ptr, queries, runs, RUN: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, RUN_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """means [b, h, runs, SIZE] of q [b, h, queries, SIZE]: of each RUN queries, of fewer at the end.

    A program takes ROWS / RUN_ROWS runs. RUN_ROWS and WIDTH are RUN and SIZE padded to powers of two.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_run = tl.program_id(0).to(tl.int64) * (ROWS // RUN_ROWS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    within = row % RUN_ROWS
    position = (first_run + row // RUN_ROWS) * RUN + within
    live = (within < RUN) & (position < queries)
    q = tl.load(
        q_ptr + batch * q_stride_b + head * q_stride_h + position[:, None] * q_stride_n + column[None, :].to(tl.int64) * q_stride_d,
        mask=live[:, None] & (column < SIZE)[None, :],
        other=0.0,
    ).to(tl.float32)
    total = tl.sum(tl.reshape(q, (ROWS // RUN_ROWS, RUN_ROWS, WIDTH)), axis=1)
    run = first_run + tl.arange(0, ROWS // RUN_ROWS)
    count = tl.maximum(tl.minimum(queries - run * RUN, RUN), 1).to(tl.float32)
    tl.store(
        means_ptr + ((batch * tl.num_programs(1) + head) * runs + run)[:, None] * SIZE + column[None, :],
        (total / count[:, None]).to(means_ptr.dtype.element_ty),
        mask=(run < runs)[:, None] & (column < SIZE)[None, :],
    )
