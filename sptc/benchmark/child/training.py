"""One training step of one variant, and what is told of it: loss, gradients, seconds, memory, which kinds of operators take its time."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from sptc.backend import KEEPING_LITTLE, spt
from sptc.benchmark.job import Job
from sptc.benchmark.model import loss_of, make, trained
from sptc.device.heap import give_back
from sptc.paper.prepare import prepare


@dataclass(frozen=True)
class Gradients:
    """The loss and the gradient of every parameter that has one, on the CPU."""

    loss: float
    by_name: dict[str, Tensor]
    random: bool = False  # the forward drew random numbers: another run's gradients are others

    def norm(self) -> float:
        return sum(float(g.double().square().sum()) for g in self.by_name.values()) ** 0.5


class Training:
    """A model in training, with AdamW. Nothing is compiled before the first step."""

    def __init__(self, job: Job, reference: bool = False) -> None:
        torch.set_float32_matmul_precision("highest" if reference else job.variant.precision)
        self.device = torch.device(job.device)
        self.model, self.args, self.kwargs, self.notes = make(job, reference)
        self.autocast = job.dtype == "bf16" and not reference
        if job.variant.prepares and not reference:
            with self._autocast():
                prepare(self.model, self.kwargs or self.args, dict(job.variant.options))
        self.call = self.model if reference else _compiled(self.model, job)
        self.optimizer = torch.optim.AdamW([p for _, p in trained(self.model)], lr=1e-4, weight_decay=0.0)

    def loss(self, call: Any = None) -> Tensor:
        with self._autocast():
            return loss_of((call or self.call)(*self.args, **self.kwargs))

    def step(self) -> None:
        """Forward, backward, optimizer."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed_step(self) -> tuple[float, float]:
        """Seconds of the wall clock and of the processor, of all threads."""
        self._wait()
        processor, wall = time.process_time(), time.perf_counter()
        self.step()
        self._wait()
        return time.perf_counter() - wall, time.process_time() - processor

    def gradients(self, eager: bool = False) -> Gradients:
        """Loss and gradients of one pass, without a step; eagerly, however the variant runs."""
        state = self._random_state()
        loss = self.loss(self.model if eager else None)
        random = not torch.equal(state, self._random_state())
        loss.backward()
        found = {name: p.grad.detach().cpu().clone() for name, p in trained(self.model) if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return Gradients(loss.item(), found, random)

    def moved(self) -> tuple[int, int]:
        """How many trained tensors a step changes, of how many."""
        before = {name: p.detach().clone() for name, p in trained(self.model)}
        self.step()
        return sum(not torch.equal(before[name], p) for name, p in trained(self.model)), len(before)

    def memory(self) -> tuple[float, float] | None:
        """MiB at rest, and the most that a step takes beyond them; None where the system does not tell."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            rest = torch.cuda.memory_allocated(self.device)
            self.step()
            self._wait()
            return rest / 2**20, (torch.cuda.max_memory_allocated(self.device) - rest) / 2**20
        give_back()  # what was freed does not count as resting
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            rest = _status("VmRSS")
        except OSError:
            return None
        self.step()
        return rest / 1024, (_status("VmHWM") - rest) / 1024

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()


def _compiled(model: torch.nn.Module, job: Job) -> Any:
    variant = job.variant
    if variant.backend == "eager":
        return model
    options = dict(variant.options) or None
    if variant.keeps_little:  # the partitioner runs at the first call; this process has no other variant
        for key, value in KEEPING_LITTLE.items():
            setattr(functorch_config, key, value)
    if variant.backend == "spt":
        return torch.compile(model, backend=spt, options=options)
    return torch.compile(model, mode=variant.mode, options=options)


def _status(key: str) -> int:
    """KiB that the kernel counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def most_of_tensors(training: Training) -> float:
    """MiB that the tensors of a step take at once, beyond those that were there before; told by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    if training.device.type == "cuda":
        _, added = training.memory() or (0.0, 0.0)
        return added
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        training.step()
    taken = most = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            taken += event.nbytes()
            most = max(most, taken)
    return most / 2**20


def kinds_of_operators(training: Training) -> dict[str, float]:
    """Shares of a step by kind of operator, told by torch's profiler; what stands between operators counts as the rest."""
    from torch.profiler import ProfilerActivity, profile

    cuda = training.device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[ProfilerActivity.CPU, activity] if cuda else [activity]) as recorded:
        start = time.perf_counter()
        training.timed_step()
        seconds = time.perf_counter() - start
    taken = dict.fromkeys(("attention", "products", "choosing"), 0.0)
    for event in recorded.key_averages():
        kind = _kind(event.key)
        if kind is not None:
            taken[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    shares = {kind: spent / seconds for kind, spent in taken.items()}
    return {**shares, "rest": max(0.0, 1.0 - sum(shares.values()))}


_CHOOSING = ("select_blocks", "choose_units", "fit_linear", "sample_tokens", "split_tokens", "rows_where", "in_steps", "sptc::route")
_PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::", "onednn::"),
    *("sptc::gather_product", "sptc::scatter_product", "sptc::outer_product", "gemm", "cutlass", "nvjet"),
)
_ATTENTION = ("attention", "flash", "fmha")


def _kind(name: str) -> str | None:
    """What an operator or a kernel does, by its name."""
    for kind, parts in (("choosing", _CHOOSING), ("attention", _ATTENTION), ("products", _PRODUCTS)):
        if any(part in name for part in parts):
            return kind
    return None
