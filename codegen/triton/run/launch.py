"""Launching emitted kernels, or recording what would be launched: for dumps and for compiling ahead of time, no device is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sptc.codegen.triton.spec import KernelSpec

Argument: TypeAlias = Tensor | int | float
Grid: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments by name: every parameter of the emitted function has a value."""

    spec: KernelSpec
    grid: Grid
    arguments: dict[str, Argument]


@dataclass(frozen=True)
class _Record:
    launches: list[Launch]
    run: bool


_record: ContextVar[_Record | None] = ContextVar("record", default=None)


@contextmanager
def recorded(run: bool = False) -> Iterator[list[Launch]]:
    """Collect launches instead of running them; with `run`, run them as well.

    Without it tensors may be fake or on "meta": what is launched never depends on their values.
    """
    launches: list[Launch] = []
    token = _record.set(_Record(launches, run))
    try:
        yield launches
    finally:
        _record.reset(token)


def launch(spec: KernelSpec, grid: Grid, device: torch.device, arguments: dict[str, Argument]) -> None:
    """Run the kernel of `spec` on `device`: compiled on a GPU, in Triton's interpreter on a CPU. An empty grid launches nothing."""
    record = _record.get()
    if record is not None:
        record.launches.append(Launch(spec, grid, arguments))
    if 0 in grid or (record is not None and not record.run):
        return
    from sptc.codegen.triton.run.load import load  # imports Triton, which a CPU without the interpreter never needs

    load(spec, interpret=device.type == "cpu").launch(grid, arguments, device)
