"""One of the runs, in a process of its own: it acts only when told to, so that the two can take turns on one machine."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import sptc
from bench.demo.classifier import classifier


@dataclass(frozen=True)
class Job:
    """What to train and how; two runs that are compared differ in `backend` and its options alone."""

    backend: Literal["inductor", "spt"]
    model: str  # a Hugging Face name or a local folder
    data: str  # file with the pieces: {"train": (input_ids, labels), "held_out": (input_ids, labels)}
    classes: int
    cache: str  # a fresh folder for compiled code: compile seconds are those of a first run
    steps: int
    batch: int
    learning_rate: float
    dropout: float
    seed: int
    bf16: bool = False  # autocast over fp32 weights
    options: dict[str, Any] = field(default_factory=dict)  # of torch.compile


class Run:
    """A model in training. Each public method is a command, and yields its answers."""

    def __init__(self, job: Job) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(job.cache, "inductor"))
        os.environ["TRITON_CACHE_DIR"] = str(Path(job.cache, "triton"))
        torch.set_num_threads(os.cpu_count() or 1)
        self.job = job
        data = torch.load(job.data, weights_only=True)
        self.train_ids, self.train_labels = data["train"]
        self.held_out_ids, self.held_out_labels = data["held_out"]
        self.order = _order(len(self.train_labels), job)
        torch.manual_seed(job.seed)
        self.model = classifier(job.model, job.classes, job.dropout)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _rate(step, job.steps))
        self.compiled = torch.compile(self.model, backend=job.backend, options=job.options or None)

    def train(self, first: int, last: int) -> Iterator[tuple[float, float]]:
        """Steps first to last - 1; yields the loss and the seconds of each."""
        self.model.train()
        for step in range(first, last):
            batch = self._batch(step)
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.job.bf16):
                loss = self.compiled(**batch, labels=self.train_labels[self.order[step]])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds = time.perf_counter() - start
            self.schedule.step()
            yield loss.item(), seconds

    def evaluate(self) -> Iterator[tuple[int, int, float]]:
        """Held-out batches; yields the pieces told rightly, the pieces, and the seconds of each."""
        self.model.eval()
        size = self.job.batch
        for first in range(0, len(self.held_out_labels), size):
            ids, labels = self.held_out_ids[first : first + size], self.held_out_labels[first : first + size]
            full = torch.cat([ids, self.held_out_ids[: size - len(ids)]])  # the last batch has the shape of the others: one compile
            start = time.perf_counter()
            with torch.no_grad():
                logits = self.compiled(input_ids=full, attention_mask=torch.ones_like(full))[: len(ids)]
            seconds = time.perf_counter() - start
            yield int((logits.argmax(-1) == labels).sum()), len(ids), seconds

    def peak_bytes(self) -> Iterator[int]:
        """The most memory that this process has held so far."""
        yield resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def report(self) -> Iterator[str]:
        """What was rewritten and what was not."""
        yield str(sptc.report(self.compiled))

    def _batch(self, step: int) -> dict[str, torch.Tensor]:
        ids = self.train_ids[self.order[step]]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _order(pieces: int, job: Job) -> torch.Tensor:
    """int64 [steps, batch]: every piece once before any comes again."""
    generator = torch.Generator().manual_seed(job.seed)
    needed = job.steps * job.batch
    rounds = [torch.randperm(pieces, generator=generator) for _ in range(-(-needed // pieces))]
    return torch.cat(rounds)[:needed].view(job.steps, job.batch)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up over a tenth of the steps, down over the last half."""
    return min((step + 1) / (0.1 * steps), 1.0, (steps - step) / (0.5 * steps))
