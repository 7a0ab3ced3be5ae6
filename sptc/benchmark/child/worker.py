"""The commands of a process that runs one variant."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sptc.benchmark.child.training import Gradients, Training, kinds_of_operators, most_of_tensors
from sptc.benchmark.job import Job
from sptc.model.compiled import report

TOLERANCE = 1e-5  # the bound of the tests of density 1: fp32 against fp64
_ROOM = 3.0  # by how much more than the dense model's own rounding an exact variant may be off
_KINKS = 1e-3  # of a gradient's norm: a ReLU whose input is rounded to the other side of 0 changes a few of its numbers by some percent


@dataclass(frozen=True)
class Check:
    """One step of a variant beside the reference, which is dense, eager, and of a wider dtype."""

    loss: float
    norm: float  # of all gradients
    moved: int  # trained tensors that a step changed
    trained: int
    compile_seconds: float  # the first step, cold, beyond a usual one
    reference_loss: float | None = None
    reference_norm: float | None = None
    cosine: float | None = None  # between the gradients and the reference's
    error: float | None = None  # of the worst gradient, as the tests of density 1 measure it
    norm_error: float | None = None  # of the worst gradient, of its norm
    dense_error: float | None = None  # of the eager model's gradients, in the same dtype: what rounding alone does
    left_out: str | None = None  # why there is no comparison

    @property
    def bound(self) -> float:
        return max(TOLERANCE, _ROOM * (self.dense_error or 0.0))

    @property
    def passed(self) -> bool | None:
        """Whether an exact variant computes what the dense model does; None where that is not known."""
        if self.error is None or self.norm_error is None or self.dense_error is None:
            return None
        return self.error <= self.bound or self.norm_error <= _KINKS


class Runner:
    """A variant in its own process. Each public method is a command, and yields its answers."""

    def __init__(self, job: Job, reference: bool = False) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(job.cache, "inductor"))
        os.environ["TRITON_CACHE_DIR"] = str(Path(job.cache, "triton"))
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job = job
        self.training = Training(job, reference)

    def notes(self) -> Iterator[list[str]]:
        """What is to be said of the model."""
        yield self.training.notes

    def reference(self, path: str) -> Iterator[None]:
        """Write loss and gradients of the dense model to a file."""
        gradients = self.training.gradients(eager=True)
        torch.save((gradients.loss, gradients.by_name, gradients.random), path)
        yield None

    def check(self, path: str | None) -> Iterator[Check]:
        """Compile, and compare with the reference in a file, if there is one."""
        training = self.training
        peer = training.gradients(eager=True) if self.job.variant.exact and path is not None else None
        start = time.perf_counter()
        found = training.gradients()
        first = time.perf_counter() - start
        moved, of = training.moved()
        usual, _ = training.timed_step()
        plain = Check(found.loss, found.norm(), moved, of, max(0.0, first - usual))
        yield plain if path is None else compared(plain, found, _read(path), peer)

    def start(self) -> Iterator[tuple[float, float]]:
        """Compile with what an earlier process left in the cache; yields the seconds that took beyond a usual step, and those of a step."""
        first, _ = self.training.timed_step()
        self.training.timed_step()
        usual, _ = self.training.timed_step()
        yield max(0.0, first - usual), usual

    def steps(self, count: int) -> Iterator[list[tuple[float, float]]]:
        """Wall and processor seconds of some steps in a row. Memory that a GPU's allocator holds between turns is given back."""
        cuda = self.training.device.type == "cuda"
        if cuda:
            self.training.step()
        yield [self.training.timed_step() for _ in range(count)]
        if cuda:
            torch.cuda.empty_cache()

    def memory(self) -> Iterator[tuple[float, float] | None]:
        """MiB at rest, and of a step beyond them."""
        yield self.training.memory()

    def tensors(self) -> Iterator[float]:
        """MiB that the tensors of a step take at once."""
        yield most_of_tensors(self.training)

    def kinds(self) -> Iterator[dict[str, float]]:
        """Shares of a step by kind of operator."""
        yield kinds_of_operators(self.training)

    def report(self) -> Iterator[dict[str, Any] | None]:
        """What backend "spt" rewrote, and what it predicts."""
        yield None if self.job.variant.dense else report(self.training.call).to_dict()


def compared(check: Check, found: Gradients, reference: Gradients, peer: Gradients | None) -> Check:
    """`check` with what `found` differs by from the reference, and eager gradients of the same dtype from it."""
    if found.random or reference.random:
        return replace(check, left_out="the step draws random numbers (dropout): two runs of it differ")
    return replace(
        check,
        reference_loss=reference.loss,
        reference_norm=reference.norm(),
        cosine=_cosine(found, reference),
        error=error_of(found, reference),
        norm_error=error_of(found, reference, norms=True),
        dense_error=None if peer is None else error_of(peer, reference),
    )


def error_of(found: Gradients, reference: Gradients, norms: bool = False) -> float:
    """The greatest |found - reference| of a parameter over its largest, or over 1e-2 of the largest of all; inf if one is missing.

    With `norms` the same of norms, not of single numbers.
    """
    if found.by_name.keys() != reference.by_name.keys():
        return math.inf

    def size(gradient: Tensor) -> float:
        return float(gradient.norm() if norms else gradient.abs().max())

    largest = max(size(g.double()) for g in reference.by_name.values())
    errors = [
        size(found.by_name[name].double() - g.double()) / max(size(g.double()), 1e-2 * largest, 1e-30)
        for name, g in reference.by_name.items()
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _cosine(found: Gradients, reference: Gradients) -> float:
    shared = found.by_name.keys() & reference.by_name.keys()
    product = sum(float((found.by_name[name].double() * reference.by_name[name].double()).sum()) for name in shared)
    return product / max(found.norm() * reference.norm(), 1e-300)


def _read(path: str) -> Gradients:
    loss, by_name, random = torch.load(path)
    return Gradients(loss, by_name, random)
