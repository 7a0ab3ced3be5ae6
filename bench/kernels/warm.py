"""Compiling what a run will launch, in several processes: Triton compiles one kernel at a time, and a run has a hundred."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.backends.nvidia import driver
from triton.compiler import CompiledKernel

from sptc.codegen.triton.run.aot import build
from sptc.codegen.triton.run.launch import Argument, Launch
from sptc.codegen.triton.target import Target

_work: list[Launch] = []  # what a pool is for; its processes have a copy, since tensors on "meta" do not travel


@dataclass(frozen=True)
class Built:
    """A kernel that is in Triton's cache now, or why not."""

    template: str
    seconds: float
    error: str | None = None


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Without those that Triton compiles to the same code: of one spec and signature."""
    return list({(launch.spec, tuple(map(_kind, launch.arguments.values()))): launch for launch in launches}.values())


def warm(launches: Iterable[Launch], target: Target, processes: int, seconds: float | None = None) -> Iterator[Built]:
    """Fill Triton's cache with the kernels and what launches them, results as they come, and none that take longer than `seconds`.

    The processes are forked, so this one must not have used a GPU.
    """
    _work[:] = distinct(launches)
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork"))
    try:
        futures = {pool.submit(_build, number, target): launch.spec.template for number, launch in enumerate(_work)}
        for future in as_completed(futures, seconds):
            error = future.exception()
            failure = None if error is None else f"{type(error).__name__}: {error}"[:400]
            yield Built(futures[future], 0.0 if error else future.result(), failure)
    except TimeoutError:
        pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def build_launcher(kernel: CompiledKernel) -> bool:
    """Compile the C function that launches kernels of this signature, if this Triton has one for each: 3.6 does, 3.7 has one for all.

    Triton does so by the C compiler at a kernel's first launch, one after the other. Its cache goes by the function's text, hence by the
    signature alone.
    """
    if not hasattr(driver, "make_launcher"):
        return False
    driver.CudaLauncher(kernel.src, kernel.metadata)
    return True


def _build(number: int, target: Target) -> float:
    began = time.monotonic()
    kernel = build(_work[number], target)
    if target.device and target.backend == "cuda":  # linked with the driver's library, which a machine without a GPU has not
        build_launcher(kernel)
    return time.monotonic() - began


def _kind(argument: Argument) -> tuple[object, ...]:
    """What Triton's signatures tell apart."""
    if isinstance(argument, Tensor):
        return (argument.dtype, argument.data_ptr() % 16)
    if isinstance(argument, int):
        return (argument == 1, argument % 16 == 0, argument.bit_length() > 31)
    return (torch.float32,)
