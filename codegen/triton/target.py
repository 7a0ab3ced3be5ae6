"""The device that kernels are made for: what of it decides tile sizes, known for a present device and for named architectures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """One architecture. `shared_memory` is in bytes for one program, `registers` are 32-bit ones for one thread.

    `device` is the product's name where the target is that of a present device, "" for one that is only named.
    """

    backend: str  # Triton's: "cuda" or "hip"
    arch: int | str  # 80, 90, 100, or "gfx942"
    warp_size: int
    shared_memory: int
    registers: int = 255
    device: str = ""

    @property
    def name(self) -> str:
        return self.arch if isinstance(self.arch, str) else f"sm_{self.arch}"

    @property
    def warpgroups(self) -> bool:
        """Whether four warps multiply together, out of shared memory: wgmma of sm_90, tcgen05 of sm_100; sm_120 has neither."""
        return self.backend == "cuda" and isinstance(self.arch, int) and 90 <= self.arch < 120


KNOWN = {
    target.name: target
    for target in (
        Target("cuda", 80, 32, 163 * 1024),
        Target("cuda", 90, 32, 227 * 1024),
        Target("cuda", 100, 32, 227 * 1024),
        Target("hip", "gfx942", 64, 64 * 1024, 512),
    )
}

KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What kernels take operands in."""

_chosen: ContextVar[Target | None] = ContextVar("target", default=None)


@contextmanager
def targeting(target: Target) -> Iterator[None]:
    """Make `target_of` answer `target`, whatever the device: for kernels compiled ahead of time."""
    token = _chosen.set(target)
    try:
        yield
    finally:
        _chosen.reset(token)


def target_of(device: torch.device) -> Target:
    """The target of a device; for a CPU, where kernels run interpreted, that of an sm_80.

    Raises:
        ValueError: a device of another type.
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    if device.type in ("cpu", "meta"):
        return KNOWN["sm_80"]
    if device.type != "cuda":
        raise ValueError(f"Triton kernels run on CUDA and ROCm devices, not on {str(device)!r}")
    return _present(torch.cuda.current_device() if device.index is None else device.index)


def runs_kernels(device: torch.device) -> bool:
    """Whether the sparse ops run emitted kernels on `device`: on GPUs, and interpreted on CPUs if TRITON_INTERPRET=1 is set."""
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "") == "1")


@lru_cache
def _present(index: int) -> Target:
    properties: Any = torch.cuda.get_device_properties(index)  # its stub lacks some of its fields
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.warp_size, 64 * 1024, 512, properties.name)
    arch = 10 * properties.major + properties.minor
    return Target("cuda", arch, 32, properties.shared_memory_per_block_optin, device=properties.name)
