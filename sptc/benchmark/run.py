"""The order of events: every variant is checked, then all are timed in turns, each in its own process."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sptc.benchmark.child.process import Worker, WorkerFailed
from sptc.benchmark.child.worker import Runner
from sptc.benchmark.job import DTYPES, Job, Source
from sptc.benchmark.machine import facts
from sptc.benchmark.outcome import Bench, Case, Outcome
from sptc.benchmark.show.progress import Progress
from sptc.benchmark.variants import BenchError, Variant

_TURN = 0.3  # seconds of steps in a row, at least: what another process left in the caches then hardly shows
_FEWEST, _ENOUGH = 3, 5  # turns: however long they take, and however short


@dataclass(frozen=True)
class Settings:
    """What is run, and for how long."""

    variants: Sequence[Variant]
    batch: int = 1
    lengths: Sequence[int | None] = (512,)
    dtype: str | None = "fp32"
    device: str = "cpu"
    lora: int = 0
    counted: float = 1.0
    checkpointing: bool = False
    threads: int | None = None
    steps: int = 20  # timed steps of each variant
    seconds: float = 120.0  # of timing at one length; no turn begins after them
    once: bool = False  # one process a variant, which is checked and timed: sooner done, and nothing is known of a warm compile

    def __post_init__(self) -> None:
        """Raises BenchError for what can't be run."""
        if self.dtype not in (*DTYPES, None):
            raise BenchError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 < self.counted <= 1:
            raise BenchError(f"counted must be a share in (0, 1], got {self.counted}")
        sizes = {"steps": self.steps, "sequences": self.batch, "threads": self.threads, "lengths": min(self.lengths, key=lambda n: n or 1)}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise BenchError(f"{name} must be at least 1, got {size}")
        if self.lora < 0:
            raise BenchError(f"lora must be a rank, or 0 for none, got {self.lora}")
        if self.lora and importlib.util.find_spec("peft") is None:
            raise BenchError("lora needs PEFT: pip install 'sptc[hf]', or leave the model as it is with 0")

    def job(self, source: Source, length: int | None, cache: str = "") -> Job:
        """The step of the first variant."""
        at = source, self.variants[0], self.batch, length or 1, self.dtype, self.device
        return Job(*at, self.lora, self.counted, self.checkpointing, self.threads, cache)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "variants": [variant.name for variant in self.variants]}


def run(source: Source, settings: Settings, progress: Progress) -> Bench:
    """Check and time all variants at all lengths. A variant that fails is an outcome with its reason; the others go on."""
    known = facts(torch.device(settings.device))  # before hours in which a checkout may change
    if settings.threads is not None:
        known["threads"] = settings.threads
    cases = []
    progress.begin(len(settings.lengths) * _units(settings))
    for length in settings.lengths:
        with tempfile.TemporaryDirectory(prefix="sptc-bench-") as scratch:
            cases.append(_case(source, settings, length, Path(scratch), progress))
    progress.end()
    return Bench(known, {"model": source.name, **settings.to_dict()}, cases)


def _units(settings: Settings) -> int:
    """Of the progress bar, for one length: the reference, two processes a variant, its timed steps, and what is measured last."""
    return 1 + len(settings.variants) * (3 + settings.steps)


def _case(source: Source, settings: Settings, length: int | None, scratch: Path, progress: Progress) -> Case:
    outcomes = [Outcome(variant) for variant in settings.variants]
    case = Case(settings.batch, length, outcomes)
    job = settings.job(source, length, str(scratch))
    progress.say(f"{case.name}: the reference")
    reference = _reference(job, scratch, case)
    progress.advance()
    jobs = [replace(job, variant=variant, cache=str(scratch / f"cache{i}")) for i, variant in enumerate(settings.variants)]
    with ExitStack() as stack:
        checked = {}
        for outcome, own in zip(outcomes, jobs, strict=True):
            progress.say(f"{case.name}: {outcome.variant.name}: compiling and checking")
            worker = _checked(outcome, own, reference)
            if worker is not None:
                stack.callback(worker.close)
                checked[outcome.variant.name] = worker
                if not settings.once:
                    worker.close()
            progress.advance()
        workers, usual = [], []
        for outcome, own in zip(outcomes, jobs, strict=True):
            if outcome.failed is None:
                progress.say(f"{case.name}: {outcome.variant.name}: starting")
                with _failure_kept(outcome):
                    worker = checked[outcome.variant.name] if settings.once else stack.enter_context(_worker(own))
                    warm, seconds = worker.one("start")
                    if not settings.once:
                        outcome.compile_warm = warm if own.variant.compiles else 0.0
                    usual.append(seconds)
                    workers.append((outcome, worker))
            progress.advance()
        _take_turns(workers, min(usual, default=1.0), settings, case, progress)
        for outcome, worker in workers:
            progress.say(f"{case.name}: {outcome.variant.name}: memory and profile")
            _look_again(outcome, worker)
            progress.advance()
    return case


def _worker(job: Job) -> Worker:
    return Worker(job.variant.name, Runner, job, log=Path(f"{job.cache}.log"))


def _checked(outcome: Outcome, job: Job, reference: str | None) -> Worker | None:
    """Compile in a new process, with no cache, and compare with the reference; the process, unless that failed."""
    worker = None
    with _failure_kept(outcome):
        worker = _worker(job)
        outcome.check = worker.one("check", reference)
        outcome.compile_cold = outcome.check.compile_seconds if job.variant.compiles else 0.0
    return worker


def _look_again(outcome: Outcome, worker: Worker) -> None:
    """What would disturb the timing of steps."""
    if outcome.failed is None:
        with _failure_kept(outcome):
            memory = worker.one("memory")
            outcome.rest_mib, outcome.step_mib = (None, None) if memory is None else memory
            outcome.report = worker.one("report")
            outcome.kinds = worker.one("kinds")


def _reference(job: Job, scratch: Path, case: Case) -> str | None:
    """A file with loss and gradients of the dense model in eager mode: in fp64 for fp32, in fp32 for others. None if there can't be one."""
    path = str(scratch / "reference.pt")
    try:
        with Worker(
            "reference", Runner, replace(job, variant=Variant("reference", "eager")), True, log=scratch / "reference.log"
        ) as worker:
            case.notes += worker.one("notes")
            worker.one("reference", path)
    except WorkerFailed as failure:
        case.notes.append(f"no reference to compare gradients with: {failure}")
        return None
    return path


def _take_turns(workers: list[tuple[Outcome, Worker]], usual: float, settings: Settings, case: Case, progress: Progress) -> None:
    """Time steps in turns, forth and back, so that whatever else the machine does slows all alike."""
    count = max(1, min(settings.steps // _ENOUGH, math.ceil(_TURN / max(usual, 1e-6))))
    turns, start = math.ceil(settings.steps / count), time.monotonic()
    for turn in range(turns):
        if turn >= _FEWEST and time.monotonic() - start > settings.seconds:
            progress.advance((settings.steps - turn * count) * len(workers))
            break
        for outcome, worker in workers if turn % 2 == 0 else reversed(workers):
            if outcome.failed is None:
                progress.say(f"{case.name}: {outcome.variant.name}: turn {turn + 1} of {turns}", often=True)
                with _failure_kept(outcome):
                    outcome.turns.append(worker.one("steps", count))
            progress.advance(min(count, settings.steps - turn * count))


@contextmanager
def _failure_kept(outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except WorkerFailed as failure:
        outcome.failed, outcome.trace = str(failure), failure.trace
