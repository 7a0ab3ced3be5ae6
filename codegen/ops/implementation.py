"""Which code an op runs on a device: C++ on a CPU, emitted Triton on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sptc.codegen.triton.target import runs_kernels

_CPU = torch.device("cpu")


def implement(lib: torch.library.Library, name: str, cpu: Callable[..., Any], kernels: Callable[..., Any]) -> None:
    """Implement `sptc::{name}`: by `cpu` on CPUs, by `kernels` on GPUs, and by `kernels` on CPUs too while `runs_kernels` says so."""

    def on_cpu(*args: Any) -> Any:
        return (kernels if runs_kernels(_CPU) else cpu)(*args)

    lib.impl(name, on_cpu, "CPU")
    lib.impl(name, kernels, "CUDA")
