"""Times of calls on a device, alternating, so that a change of load or of clock rate meets all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

_BATCH_MS = 3.0  # of calls between two events: short kernels then run back to back, as in a model


@dataclass(frozen=True)
class Timing:
    """Medians over rounds: milliseconds of a call on the device, and of the host to launch it. Peak memory above what was there before."""

    ms: float
    host_ms: float
    peak_mib: float


def alternating(
    calls: Mapping[str, Call], rounds: int, device: torch.device, over: Callable[[], bool] = lambda: False
) -> dict[str, Timing]:
    """Time each call `rounds` times, in turns. A call's first run, which compiles it, is not counted.

    Once `over` says that time is over no round begins, and there are no figures of calls that were not run by then.
    """
    peaks: dict[str, float] = {}
    for name, call in calls.items():
        if not over():
            peaks[name] = _peak(call, device)
    batches = {name: _batch(calls[name], device) for name in peaks}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in peaks}
    for turn in range(rounds):
        for name, batch in batches.items():
            if turn == 0 or not over():
                taken[name].append(_time(calls[name], batch, device))
    return {
        name: Timing(statistics.median(ms for ms, _ in times), statistics.median(host for _, host in times), peaks[name])
        for name, times in taken.items()
    }


def milliseconds(call: Call, device: torch.device, rounds: int = 7) -> float:
    """The median time of one call."""
    return alternating({"": call}, rounds, device)[""].ms


def _peak(call: Call, device: torch.device) -> float:
    call()
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _batch(call: Call, device: torch.device) -> int:
    once = _time(call, 1, device)[0]
    return min(100, max(1, math.ceil(_BATCH_MS / max(once, 1e-3)))) if device.type == "cuda" else 1


def _time(call: Call, batch: int, device: torch.device) -> tuple[float, float]:
    """Device and host milliseconds a call, of `batch` calls in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(batch):
            call()
        spent = (time.perf_counter() - start) * 1e3 / batch
        return spent, spent
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    begin.record()
    for _ in range(batch):
        call()
    end.record()
    host = (time.perf_counter() - start) * 1e3 / batch
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / batch, host
