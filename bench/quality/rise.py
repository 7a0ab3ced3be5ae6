"""What sparsity costs before any training: the rise of the held-out loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.quality.planned import prepare
from bench.quality.tasks import Budget, Task
from bench.quality.training import Compile, compile_objective, evaluate, example_order
from bench.quality.variants import Options


def rises(task: Task, variants: Mapping[str, Options], budget: Budget, how: Compile) -> Iterator[tuple[str, float, float]]:
    """For each variant its name, the held-out loss as it would be trained, and how much more that is than the dense model's."""
    torch.manual_seed(0)
    plain = evaluate(task.objective().eval(), task.held_out, budget.batch, step=0).loss
    batch = task.train.take(example_order(len(task.train), budget, seed=0)[0])
    for name, options in variants.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        objective = task.objective().train()
        with TemporaryDirectory() as folder:
            if options is not None:
                options, _ = prepare(objective, batch, options, Path(folder))
            compiled = compile_objective(objective, options, how)
            if options is not None:
                compiled(**batch)  # by which densities are measured
            loss = evaluate(compiled, task.held_out, budget.batch, step=0, as_trained=True).loss
        yield name, loss, loss - plain
