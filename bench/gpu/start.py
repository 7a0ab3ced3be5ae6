"""First of all: what machine this is, that Triton compiles and launches a kernel of three lines, and the rates that bound everything."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from bench.gpu.journal import Figures
from bench.gpu.sizes import Sizes
from bench.gpu.stage import Limit
from bench.gpu.timing import one


def machine(sizes: Sizes, _: Limit) -> Iterator[Figures]:
    """What figures depend on, and `target`, from which processes that must not touch the device know it."""
    began = time.monotonic()
    torch.zeros(1, device=sizes.device)
    yield {
        "device_seconds": time.monotonic() - began,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_mib": 0 if sizes.dry else torch.cuda.get_device_properties(sizes.device).total_memory >> 20,
        "target": asdict(sizes.target()),
    }


def tiny_kernel(sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """Seconds of the first launch, compilers included, and microseconds of the host for each later one."""

    @triton.jit
    def double(x_ptr, y_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        tl.store(y_ptr + place, 2 * tl.load(x_ptr + place))

    x = torch.randn(1024, device=sizes.device)
    y = torch.full_like(x, torch.nan)
    began = time.monotonic()
    double[(8,)](x, y, 128)
    same = torch.equal(y, 2 * x)
    seconds = time.monotonic() - began
    timing = one(lambda: double[(8,)](x, y, 128), sizes, limit)
    yield {"first_seconds": seconds, "host_us": 1e3 * timing.host_ms, "device_us": 1e3 * timing.ms, "wrong": [] if same else ["double"]}


def rates(sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """FLOPs a second of a large product, bytes read and written a second of a large copy: random data, since zeros are faster."""
    for dtype in sizes.dtypes:
        a, b = (torch.randn(sizes.side, sizes.side, device=sizes.device, dtype=dtype) for _ in range(2))
        ms = one(lambda a=a, b=b: torch.mm(a, b), sizes, limit).ms  # type: ignore[misc]
        name = "product_rate" if dtype == sizes.dtype else f"product_rate_{str(dtype).removeprefix('torch.')}"
        yield {name: 2 * sizes.side**3 / ms * 1e3}
    source = torch.randn(sizes.bytes // 4, device=sizes.device)
    target = torch.empty_like(source)
    ms = one(lambda: target.copy_(source), sizes, limit).ms
    yield {"copy_rate": 2 * source.nbytes / ms * 1e3}
