"""Compiling what a run will launch, in several processes: Triton compiles one kernel at a time, and a run has a hundred."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.kernels import ahead
from bench.kernels.cases import AttentionCase, FfnCase
from sptc.codegen.aot import compile_ahead
from sptc.codegen.target import Target


def warm(cases: Sequence[AttentionCase | FfnCase], target: Target, dtype: torch.dtype, processes: int) -> list[BaseException]:
    """Fill Triton's cache with the kernels of the cases. What fails here fails again in the run, where it is reported with its case."""
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU can't be forked
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_compile, case, target, dtype) for case in cases]
        errors = [future.exception() for future in futures]
    return [error for error in errors if error is not None]


def _compile(case: AttentionCase | FfnCase, target: Target, dtype: torch.dtype) -> None:
    for launch in ahead.launches(case, target, dtype):
        compile_ahead(launch, target)
