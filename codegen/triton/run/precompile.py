"""Compiling kernels before they are launched, several at a time: Triton compiles each at its first launch, one after the other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from torch import Tensor
from tqdm import tqdm

from sptc.codegen.triton.run.launch import Argument, Launch
from sptc.codegen.triton.spec import KernelSpec
from sptc.codegen.triton.target import Target

_PATIENCE = 2.0  # seconds without a word
_Key = tuple[KernelSpec, tuple[tuple[object, ...], ...], Target]

_compiled: set[_Key] = set()  # by this process


def precompile(launches: Iterable[Launch], target: Target) -> None:
    """Fill Triton's cache with the kernels of `launches`, whose tensors may be on "meta": a launch then finds its kernel there.

    Threads are enough, and need nothing of a process that has used a GPU: Triton's passes, LLVM and ptxas let other threads run; what
    does not, the reading of a kernel's source, is a tenth of the time. A bar on a terminal's stderr shows what takes longer than seconds.

    Raises:
        triton.CompilationError: an emitted kernel is not valid Triton.
    """
    from sptc.codegen.triton.run.load import load  # imports Triton

    work = {key: launch for launch in launches if (key := _key(launch, target)) not in _compiled}
    if not work:
        return
    for launch in work.values():
        load(launch.spec)  # imports a module, which threads had better not do at once
    pool = ThreadPoolExecutor(min(len(work), _processors()))
    try:
        futures = {pool.submit(_compile, launch, target): key for key, launch in work.items()}
        done = as_completed(futures)
        for future in tqdm(done, "sptc compiles", len(futures), leave=False, unit="kernel", delay=_PATIENCE, disable=None):
            future.result()
            _compiled.add(futures[future])
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(launch: Launch, target: Target) -> None:
    from triton.runtime import driver

    from sptc.codegen.triton.run.aot import build

    kernel = build(launch, target)
    if target.device:  # present: Triton 3.6 compiles a C function that launches kernels of this signature, too
        driver.active.launcher_cls(kernel.src, kernel.metadata)


def _processors() -> int:
    """One where Python counts how deep it parses for all threads together: now and then one fails (CPython's issue 106905)."""
    if sys.version_info < (3, 11, 8) or (3, 12) <= sys.version_info < (3, 12, 2):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(launch: Launch, target: Target) -> _Key:
    return launch.spec, tuple(map(_kind, launch.arguments.values())), target


def _kind(argument: Argument) -> tuple[object, ...]:
    """What Triton compiles different code for: types, integers of 1, and what is divisible by 16."""
    if isinstance(argument, Tensor):
        return (argument.dtype, argument.data_ptr() % 16 == 0)
    if isinstance(argument, int):
        return (argument == 1, argument % 16 == 0, argument.bit_length() > 31)
    return (float,)
