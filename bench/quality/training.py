"""One run: a task, a variant, a seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from tqdm import tqdm

import sptc
from bench.quality.diagnose import diagnose
from bench.quality.planned import prepare
from bench.quality.served import served
from bench.quality.tasks import Budget, Examples, Inputs, Task
from bench.quality.variants import Options
from sptc.backend import compile_graph
from sptc.config import Config

Compile = Literal["inductor", "aot"]
WARM = 0.1  # share of the steps over which the learning rate rises; then it stays, so that a run's loss at any time is a fair one, or falls
LEFT = 0.05  # least share of the learning rate that is left of a falling one
CLIP = 1.0  # the norm that gradients are clipped to
DIAGNOSED = 4  # sequences of the example batch that regions are measured on


@dataclass(frozen=True)
class Point:
    """Held-out loss and accuracy after some steps: of the weights if the learning rate falls, else of their average (`Average`)."""

    step: int
    loss: float
    accuracy: float


@dataclass
class Record:
    """What one run measured. `points` are evaluated as trained, a sparse variant sparse; `dense_points` by the plain model (`served`)."""

    task: str
    model: str
    variant: str
    options: Options
    seed: int
    budget: Budget
    compile: Compile
    points: list[Point] = field(default_factory=list)
    dense_points: list[Point] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)  # of each step
    cpu_seconds: list[float] = field(default_factory=list)  # of each step, over all threads
    plan: dict[str, Any] | None = None  # `Planned.to_dict`, of a run with a plan of its own
    rewritten: int = 0  # regions that became sparse
    regions: list[dict[str, Any]] = field(default_factory=list)  # after training
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(task: Task, record: Record) -> None:
    """Fine-tune with LoRA as the record says, and fill it in.

    The seed decides the adapters' start and the order of the examples, the same for every variant.
    """
    torch._dynamo.reset()
    torch.manual_seed(record.seed)
    objective = task.objective().train()
    order = example_order(len(task.train), record.budget, record.seed)
    with TemporaryDirectory() as folder:
        options = record.options
        if options is not None:
            options, planned = prepare(objective, task.train.take(order[0]), options, Path(folder))
            record.plan = None if planned is None else planned.to_dict()
        _fine_tune(task, record, objective, options, order)


def _fine_tune(task: Task, record: Record, objective: nn.Module, options: Options, order: Tensor) -> None:
    """Train and evaluate the prepared objective; `options` are the record's, with the file of the run's own plan."""
    budget = record.budget
    trained = [p for p in objective.parameters() if p.requires_grad]
    average = None if budget.falling else Average(trained)
    optimizer = torch.optim.AdamW(trained, lr=budget.learning_rate, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: sptc.step(objective))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, budget))
    compiled = compile_objective(objective, options, record.compile)
    if options is not None:
        compiled(**task.train.take(order[0]))  # the first batch, by which densities are measured, is one that is trained on
    with tqdm(total=budget.steps, desc=f"{task.name} {record.variant} seed {record.seed}", unit="step") as bar:
        for step in range(budget.steps + 1):
            if step % budget.every == 0 or step == budget.steps:
                last = step in (0, budget.steps)
                with average.applied() if average else nullcontext():
                    if options is not None:
                        objective.eval()
                        record.points.append(evaluate(compiled, task.held_out, budget.batch, step, as_trained=True))
                        objective.train()
                    if options is None or last:
                        record.dense_points.append(evaluate(served(task, objective), task.held_out, budget.batch, step))
                bar.set_postfix(held_out=f"{(record.points or record.dense_points)[-1].loss:.3f}")
            if step == budget.steps:
                break
            wall, cpu = time.perf_counter(), time.process_time()
            loss, _, counted = compiled(**task.train.take(order[step]))
            (loss / counted).backward()
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            record.wall_seconds.append(time.perf_counter() - wall)
            record.cpu_seconds.append(time.process_time() - cpu)
            schedule.step()
            if average:
                average.update()
            record.losses.append((loss / counted).item())
            bar.update()
    if options is None:
        record.points = record.dense_points
    else:
        rows = [r for r in sptc.report(compiled).regions if r.graph == 0 and r.kind != "loss"]
        record.rewritten = sum(r.status == "rewritten" for r in rows)
        record.regions = [measure.to_dict() for measure in diagnose(objective, task.train.take(order[0][:DIAGNOSED]), options)]


def share_of_rate(step: int, budget: Budget) -> float:
    """The learning rate of a step, as a share of the budget's: it rises, then stays or, linearly, falls."""
    falling = max(LEFT, 1 - step / budget.steps) if budget.falling else 1.0
    return min(1.0, (step + 1) / (WARM * budget.steps)) * falling


class Average:
    """The average of some parameters over the last ninth or so of the steps, at any step (polynomial decay, Shamir and Zhang 2013).

    It stands for a learning rate that has fallen by then, which would be fair at the last step alone.
    """

    _DECAY = 8  # the n-th step has weight (_DECAY + 1) / (_DECAY + n): the first one all of it

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._mean = [p.detach().clone() for p in self._parameters]
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer."""
        self._steps += 1
        weight = (self._DECAY + 1) / (self._DECAY + self._steps)
        for mean, parameter in zip(self._mean, self._parameters, strict=True):
            mean.lerp_(parameter, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold their averages inside of the context."""
        with torch.no_grad():
            own = [p.clone() for p in self._parameters]
            self._hold(self._mean)
        try:
            yield
        finally:
            with torch.no_grad():
                self._hold(own)

    def _hold(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def compile_objective(objective: nn.Module, options: Options, how: Compile) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The compiled objective. `aot` leaves Inductor out: the same sparse operators and the same values, no wait for its compile."""
    if how == "inductor":
        if options is None:
            return torch.compile(objective, backend="inductor")
        return torch.compile(objective, backend="spt", options=options)
    if options is None:
        return torch.compile(objective, backend=_aot)
    config = Config.from_options(options)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(gm, inputs, config, inner=lambda graph, examples, _: _aot(graph, examples))

    return torch.compile(objective, backend=backend)


_aot = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward))


def evaluate(
    objective: Callable[..., tuple[Tensor, Tensor, Tensor]], examples: Examples, batch: int, step: int, as_trained: bool = False
) -> Point:
    """Mean loss and share of right answers over all labels that count, in whole batches: a shorter last one would compile anew.

    `as_trained`: gradients are enabled, and not computed, so that a compiled objective is captured as in training.
    """
    loss = right = counted = 0.0
    with torch.set_grad_enabled(as_trained):
        for inputs in batches(examples, batch):
            sums = [float(part.detach()) for part in objective(**inputs)]
            loss, right, counted = (total + part for total, part in zip((loss, right, counted), sums, strict=True))
    return Point(step, loss / counted, right / counted)


def batches(examples: Examples, batch: int) -> Iterator[Inputs]:
    """Whole batches in order; what is left at the end is not used.

    Raises:
        ValueError: there is not a single whole batch.
    """
    if len(examples) < batch:
        raise ValueError(f"{len(examples)} held-out sequences are less than one batch of {batch}")
    for first in range(0, len(examples) - batch + 1, batch):
        yield examples.take(slice(first, first + batch))


def example_order(examples: int, budget: Budget, seed: int) -> Tensor:
    """int64 [steps, batch]: every example once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    needed = budget.steps * budget.batch
    rounds = [torch.randperm(examples, generator=generator) for _ in range(-(-needed // examples))]
    return torch.cat(rounds)[:needed].view(budget.steps, budget.batch)
