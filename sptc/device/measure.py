"""Measure what a device can do, for the cost model in `passes/decide/cost.py`.

On a CPU one thread is measured, in processor time, and rates are taken to grow with the number of threads: what else runs on the machine
then hardly shows, and dense and sparse are always compared under the same conditions. That takes two to three seconds. On a GPU the same
calls are timed by events, with sizes that fill it and with the sparse ops in bf16; their kernels are compiled first, all at once.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sptc.codegen.reference.block_lists import query_run
from sptc.codegen.triton.run.launch import Launch
from sptc.codegen.triton.run.precompile import precompile
from sptc.codegen.triton.target import target_of, targeting

_SECONDS = 0.06  # for one measurement: the least of the times that fit
_HEAD = 64  # size of an attention head
_SHORT = 128  # the length of a short sequence


@dataclass(frozen=True)
class _Bench:
    """A device, and sizes that are large for it."""

    device: torch.device
    sparse_dtype: torch.dtype  # of the sparse ops
    heads: int
    dense_length: int  # of attention
    sparse_length: int
    blocks: tuple[int, int]  # query_block, key_block
    product: tuple[int, int, int]  # rows, inner and columns of a product
    memory: int  # floats that no cache holds
    values: int  # floats that a cache holds

    @classmethod
    def of(cls, device: torch.device) -> _Bench:
        if device.type == "cpu":
            return cls(device, torch.float32, 4, 2048, 1024, (32, 16), (1024, 512, 2048), 1 << 23, 1 << 18)
        return cls(device, torch.bfloat16, 32, 4096, 8192, (128, 64), (8192, 4096, 4096), 1 << 25, 1 << 21)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers that do not touch the global generator."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, dtype=torch.float32, device=self.device, generator=torch.Generator(self.device).manual_seed(0)).to(dtype)

    def seconds(self, run: Callable[[], object]) -> float:
        """The least time of a call, after one that does not count: of the processor, or between events on a GPU. Without data, nothing."""
        run()
        if self.device.type == "meta":
            return math.inf
        once = self._on_gpu if self.device.type == "cuda" else _on_thread
        best, total = math.inf, 0.0
        while total < _SECONDS:
            taken = once(run)
            best, total = min(best, taken), total + taken
        return best

    def _on_gpu(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end), 1e-4) / 1e3


def _on_thread(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return max(time.thread_time() - start, 1e-9)


def measure(device: torch.device) -> dict[str, Any]:
    """The numbers of `sptc.device.costs.DeviceCosts`; rates are those of one thread, or of a GPU. Takes memory of the device for a while.

    Random numbers, autocast, grad mode and number of threads are as before when it returns.
    """
    with _neutral_state(device):
        bench = _Bench.of(device)
        if device.type == "cuda":
            precompile(launches(device), target_of(device))
        single, half = _rates(bench, torch.float32), _rates(bench, torch.bfloat16)
        memory = torch.zeros(bench.memory, device=device)
        target = torch.empty_like(memory)
        values = torch.ones(bench.values, device=device)
        sparse = _sparse_attention(bench)
        half_sparse = sparse if bench.sparse_dtype == torch.bfloat16 else _sparse_attention(replace(bench, sparse_dtype=torch.bfloat16))
        return {
            "single": single,
            "half": half,
            "bandwidth": 2 * memory.nbytes / bench.seconds(lambda: target.copy_(memory)),
            "exponentials": values.numel() / bench.seconds(lambda: torch.exp(values)),
            "op_seconds": bench.seconds(lambda: torch.add(values[:64], values[:64])),
            **sparse,
            "bf16_gain": half_sparse["sparse_attention"] / sparse["sparse_attention"],
            "bf16_gain_backward": half_sparse["sparse_attention_backward"] / sparse["sparse_attention_backward"],
        }


def launches(device: torch.device) -> list[Launch]:
    """The kernels that measuring a GPU launches, told without running any."""
    from sptc.codegen.ops.launches import launches_of  # its operators have an implementation that asks `sptc.device` for the processor

    bench = replace(_Bench.of(device), device=torch.device("meta"))
    found: list[Launch] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.extend(launches_of(func, args))
            return func(*args, **(kwargs or {}))

    with targeting(target_of(device)), Recorder():
        _sparse_attention(bench)
    return found


def _rates(bench: _Bench, dtype: torch.dtype) -> dict[str, float]:
    rows, inner, columns = bench.product
    x, weight = bench.random(rows, inner, dtype=dtype), bench.random(columns, inner, dtype=dtype)
    long = bench.dense_length
    at = {n: _dense_attention(bench, dtype, n) for n in (_SHORT, long)}  # as many queries each
    share = _SHORT / long  # of the products
    besides = [max((a - share * b) / (1 - share), 0.0) for a, b in zip(at[_SHORT], at[long], strict=True)]
    forward, backward = (_rest(time, fixed) for time, fixed in zip(at[long], besides, strict=True))
    flops = 4 * bench.heads * long * long * _HEAD
    return {
        "gemm": 2 * rows * inner * columns / bench.seconds(lambda: linear(x, weight)),
        "attention": flops / forward,
        "attention_backward": 2.5 * flops / backward,
        "row_seconds": max(sum(besides) / (bench.heads * long), 1e-12),
    }


def _dense_attention(bench: _Bench, dtype: torch.dtype, n: int) -> tuple[float, float]:
    """Seconds of scaled_dot_product_attention, forward and backward, in sequences of length n."""
    q, k, v = (bench.random(bench.dense_length // n, bench.heads, n, _HEAD, dtype=dtype).requires_grad_() for _ in range(3))
    out = scaled_dot_product_attention(q, k, v)
    return (
        bench.seconds(lambda: scaled_dot_product_attention(q, k, v)),
        bench.seconds(lambda: torch.autograd.grad(out, (q, k, v), out, retain_graph=True)),
    )


def _sparse_attention(bench: _Bench) -> dict[str, float]:
    ops, blocks, heads = torch.ops.sptc, bench.blocks, bench.heads
    everything: tuple[Any, ...] = ("True", [], [], None, None)
    codebooks = bench.random(heads, 8, 16, _HEAD // 8)

    def timed(n: int) -> tuple[float, float, float, float]:
        q, k, v = (bench.random(1, heads, n, _HEAD, dtype=bench.sparse_dtype).requires_grad_() for _ in range(3))
        plain = [t.detach() for t in (q, k)]

        def select(selector: str, books: Tensor | None) -> tuple[Tensor, ...]:
            return ops.select_blocks(*plain, books, *everything, selector, 0.125, 0.125, *blocks, False, False)

        ids, counts = select("pooled", None)[:2]

        def forward() -> Tensor:
            return ops.sparse_attention(q, k, v, ids, counts, *everything, None, 0.0, 0.125, *blocks, "u0", None)[0]

        out = forward()
        return (
            bench.seconds(lambda: select("pooled", None)),
            bench.seconds(lambda: select("pq", codebooks)),
            bench.seconds(forward),
            bench.seconds(lambda: torch.autograd.grad(out, (q, k, v), out, retain_graph=True)),
        )

    n = bench.sparse_length
    least, times = timed(64), timed(n)
    pooled, coded, forward, backward = (_rest(time, fixed) for time, fixed in zip(times, least, strict=True))
    flops = 4 * heads * n * (n // 8) * _HEAD
    return {
        "pooled": heads * (n // query_run(blocks[0])) * n * _HEAD / pooled,
        "coded": 2 * heads * n * 8 * 16 * _HEAD / coded,
        "sparse_attention": flops / forward,
        "sparse_attention_backward": 2.5 * flops / backward,
        "attention_seconds": min(least[0], least[1]) + least[2] + least[3],
    }


def _rest(seconds: float, fixed: float) -> float:
    """What is left of a time without its fixed part, which noise must not turn negative."""
    return max(seconds - fixed, 0.2 * seconds)


@contextmanager
def _neutral_state(device: torch.device) -> Iterator[None]:
    """A backend is called in whatever mode the user's model runs; here it is one thread in fp32 with gradients, without an interpreter."""
    threads, interpret = torch.get_num_threads(), os.environ.pop("TRITON_INTERPRET", None)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        if interpret is not None:  # it is for checking kernels: what it takes says nothing
            stack.callback(os.environ.__setitem__, "TRITON_INTERPRET", interpret)
        torch.set_num_threads(1)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.device("cpu"))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield
