"""What a device can do, measured once: the constants of the cost model in `passes/cost.py`.

One thread is measured, in processor time, and rates are taken to grow with the number of threads: what else runs on the machine then
hardly shows, and dense and sparse are always compared under the same conditions. The measurements take less than two seconds and are
kept in a private cache folder (`$XDG_CACHE_HOME/sptc` or `~/.cache/sptc`), one file for each processor, torch version and version of
the kernels. A file that cannot be read is measured anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sptc.config import ConfigError

log = logging.getLogger(__name__)

Blocks = Callable[[int, int, float, bool], tuple[int, int]]

_SECONDS = 0.06  # for one measurement: the least of the times that fit


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in one dtype, of all threads."""

    gemm: float  # a large product
    attention: float  # scaled_dot_product_attention, forward
    attention_backward: float


@dataclass(frozen=True)
class DeviceCosts:
    """What the cost model knows of a device. Rates are per second, of all threads."""

    single: Rates
    half: Rates
    bandwidth: float  # bytes read or written, out of cache
    exponentials: float
    sparse_attention: float  # FLOPs of sptc::sparse_attention at density 1/8, gathers and softmax included
    sparse_attention_backward: float
    pooled: float  # (query, key block) pairs of the pooled selector, for one element of the head size
    coded: float  # (vector, codeword) pairs of the pq selector, for one element of the head size
    routed: float  # rate of sptc::routed_ffn, gathers included, as a share of gemm
    op_seconds: float  # a small operator
    attention_seconds: float  # sparse attention of next to nothing, selection, forward and backward
    routed_seconds: float  # routed FFN of next to nothing, one block, forward and backward
    default_blocks: Blocks  # (queries, keys, density, whether a tile owns blocks) -> (query_block, key_block)

    def rates(self, dtype: torch.dtype | None) -> Rates:
        return self.half if dtype in (torch.bfloat16, torch.float16) else self.single


_NUMBERS = {f.name for f in fields(DeviceCosts)} - {"single", "half", "default_blocks"}


def check_device(device: torch.device) -> None:
    """Raises ConfigError for a device that this version has no kernels for."""
    if device.type != "cpu":
        raise ConfigError(
            f"backend 'spt': no kernels for device {str(device)!r} in this version; "
            "move the model and its inputs to the CPU, or compile with another backend"
        )


def calibrate(device: torch.device, default_blocks: Blocks) -> DeviceCosts:
    """The constants of `device`, from the cache or measured now. Global state (random numbers, autocast, grad mode) is left alone.

    Args:
        device: one that `check_device` accepts.
        default_blocks: (queries, keys, density, whether a tile owns blocks) -> (query_block, key_block) of the device's kernels.
    """
    check_device(device)
    return _costs(_constants(_key()), torch.get_num_threads(), default_blocks)


def _costs(values: Mapping[str, Any], threads: int, default_blocks: Blocks) -> DeviceCosts:
    """The constants of one thread, for `threads` of them."""
    scaled = {name: values[name] * threads for name in _NUMBERS if name != "routed" and not name.endswith("seconds")}
    single, half = (Rates(**{key: rate * threads for key, rate in values[name].items()}) for name in ("single", "half"))
    return DeviceCosts(**{**values, **scaled, "single": single, "half": half}, default_blocks=default_blocks)


def cache_folder() -> Path:
    """The private cache folder; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and os.path.isabs(base) else Path.home() / ".cache") / "sptc"


def _key() -> str:
    parts = [processor(), torch.__version__, _kernel_sources()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kept = {line for line in lines if line.startswith(("model", "cpu family", "flags", "CPU part", "CPU implementer", "Features"))}
    return "\n".join(sorted(kept))


@functools.cache
def _kernel_sources() -> str:
    """A digest of this file and of the kernels: a faster kernel is a reason to measure again."""
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted((Path(__file__).parent / "codegen").glob("**/*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _constants(key: str) -> dict[str, Any]:
    path = cache_folder() / f"device-{key}.json"
    values = _load(path)
    if values is None:
        values = _measure()
        _save(path, values)
    return values


def _load(path: Path) -> dict[str, Any] | None:
    """The constants in `path`; None if it is missing or holds anything else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    rates = {f.name for f in fields(Rates)}

    def holds(mapping: Any, names: set[str]) -> bool:
        return isinstance(mapping, dict) and all(isinstance(mapping.get(n), float) and 0 < mapping[n] < math.inf for n in names)

    if not holds(values, _NUMBERS) or values.keys() != _NUMBERS | {"single", "half"}:
        return None
    if not all(holds(values[name], rates) and values[name].keys() == rates for name in ("single", "half")):
        return None
    return values


def _save(path: Path, values: dict[str, Any]) -> None:
    """Write whole or not at all. Without a place to write, the constants last for this process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(path.parent, 0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump(values, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("cannot keep the device's measurements in %s (%s): they are taken again by the next process", path.parent, error)


def _measure() -> dict[str, Any]:
    with _neutral_state():
        single, half = _rates(torch.float32), _rates(torch.bfloat16)
        memory = torch.zeros(1 << 23)
        target = torch.empty_like(memory)
        values = torch.rand(1 << 18, generator=torch.Generator().manual_seed(0))
        return {
            "single": asdict(single),
            "half": asdict(half),
            "bandwidth": 2 * memory.nbytes / _seconds(lambda: target.copy_(memory)),
            "exponentials": values.numel() / _seconds(lambda: torch.exp(values)),
            "op_seconds": _seconds(lambda: torch.add(values[:64], values[:64])),
            **_sparse_attention(),
            **_routed_ffn(single.gemm),
        }


def _rates(dtype: torch.dtype) -> Rates:
    x, weight = _random(1024, 512).to(dtype), _random(2048, 512).to(dtype)
    q, k, v = (_random(1, 4, 1024, 64).to(dtype).requires_grad_() for _ in range(3))
    flops = 4 * 4 * 1024 * 1024 * 64

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    out = forward()
    return Rates(
        gemm=2 * 1024 * 512 * 2048 / _seconds(lambda: torch.nn.functional.linear(x, weight)),
        attention=flops / _seconds(forward),
        attention_backward=2.5 * flops / _seconds(lambda: torch.autograd.grad(out, (q, k, v), out, retain_graph=True)),
    )


def _sparse_attention() -> dict[str, float]:
    ops, blocks = torch.ops.sptc, (64, 32)
    everything: tuple[Any, ...] = ("True", [], [], None, None)
    codebooks = _random(4, 8, 16, 8)

    def timed(n: int) -> tuple[float, float, float, float]:
        q, k, v = (_random(1, 4, n, 64).requires_grad_() for _ in range(3))
        plain = [t.detach() for t in (q, k)]

        def select(selector: str, books: Tensor | None) -> tuple[Tensor, ...]:
            return ops.select_blocks(*plain, books, *everything, selector, 0.125, 0.125, *blocks, False, False)

        ids, counts = select("pooled", None)[:2]

        def forward() -> Tensor:
            return ops.sparse_attention(q, k, v, ids, counts, *everything, None, 0.0, 0.125, *blocks)[0]

        out = forward()
        return (
            _seconds(lambda: select("pooled", None)),
            _seconds(lambda: select("pq", codebooks)),
            _seconds(forward),
            _seconds(lambda: torch.autograd.grad(out, (q, k, v), out, retain_graph=True)),
        )

    n = 2048
    least, times = timed(64), timed(n)
    pooled, coded, forward, backward = (_rest(time, fixed) for time, fixed in zip(times, least, strict=True))
    flops = 4 * 4 * n * (n // 8) * 64
    return {
        "pooled": 4 * n * (n // 32) * 64 / pooled,
        "coded": 2 * 4 * n * 8 * 16 * 64 / coded,
        "sparse_attention": flops / forward,
        "sparse_attention_backward": 2.5 * flops / backward,
        "attention_seconds": min(least[0], least[1]) + least[2] + least[3],
    }


def _routed_ffn(gemm: float) -> dict[str, float]:
    groups, active = 8, 4

    def timed(tokens: int, size: int, hidden: int) -> float:
        x = _random(tokens, size).requires_grad_()
        up, down = _random(hidden, size), _random(hidden, size)
        lists = torch.ops.sptc.route(_random(tokens, groups), active)

        def run() -> None:
            y = torch.ops.sptc.routed_ffn(
                x, [up], [], [], [], [], [], down, None, lists[0], lists[1], None, None, None, 0.0, 0.0, "relu(u0)"
            )[0]
            torch.autograd.grad(y, x, y)

        return _seconds(run)

    tokens, size, hidden = 1024, 768, 3072
    least = timed(8, 16, 64)
    seconds = _rest(timed(tokens, size, hidden), least)
    return {"routed": (active / groups) * 8 * tokens * size * hidden / seconds / gemm, "routed_seconds": least / groups}


def _rest(seconds: float, fixed: float) -> float:
    """What is left of a time without its fixed part, which noise must not turn negative."""
    return max(seconds - fixed, 0.2 * seconds)


def _random(*shape: int) -> Tensor:
    """Random numbers that do not touch the global generator."""
    return torch.randn(shape, dtype=torch.float32, device="cpu", generator=torch.Generator().manual_seed(0))


def _seconds(run: Callable[[], object]) -> float:
    """The least processor time of a call, after one that does not count."""
    run()
    best, stop = math.inf, time.thread_time() + _SECONDS
    while True:
        start = time.thread_time()
        run()
        end = time.thread_time()
        best = min(best, end - start)
        if end > stop:
            return best


@contextmanager
def _neutral_state() -> Iterator[None]:
    """A backend is called in whatever mode the user's model runs; here it is one thread in fp32 with gradients."""
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        yield
