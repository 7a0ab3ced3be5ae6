"""Measuring the tile sizes of every template on this GPU, for the layers that `make gpu` times."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from bench.gpu.sizes import FULL
from bench.kernels.cases import AttentionCase, attention_operands, named
from bench.kernels.clock import milliseconds
from bench.kernels.steps import attention_step
from sptc.codegen.triton.tuning.tiling import Tiling
from sptc.codegen.triton.tuning.tune import tune_each


def run(only: str) -> int:
    """Print what was chosen; 0. Questions that have an answer on disk are not measured again."""
    if not torch.cuda.is_available():
        print("tile sizes are measured on a GPU, and torch sees none", file=sys.stderr)
        return 2
    found: list[dict[str, Any]] = []
    for case in named(FULL.attention, only):
        found += rows(case, torch.device("cuda"), torch.bfloat16, lambda: None)
        print(f"{case.name}: {len(found)} questions answered", file=sys.stderr, flush=True)
    print(tabulate([{key: value for key, value in row.items() if key != "all"} for row in found], headers="keys"))
    return 0


def rows(case: AttentionCase, device: torch.device, dtype: torch.dtype, check: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """What is best for each kernel of the case, beside what the table says, and milliseconds of the whole step with each candidate.

    `check` is called before each measurement, and may raise: the rows so far are kept on disk, as tuning keeps them.
    """

    def timed(call: Callable[[], object]) -> float:
        check()
        return milliseconds(call, device)

    with torch.no_grad():
        for choice in tune_each(step(case, device, dtype), timed):
            times = dict(choice.milliseconds)
            default = next(iter(times))
            yield {
                "tuned": choice.question.table.template,
                "best": _text(choice.best),
                "ms": times[choice.best],
                "default": _text(default),
                "default_ms": times[default],
                "facts": ", ".join(f"{key}={value}" for key, value in choice.question.facts),
                "all": {_text(tiling): ms for tiling, ms in times.items()},
            }


def step(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """One training step of the op of a case, on operands made now."""
    return functools.partial(attention_step, case, attention_operands(case, device, dtype))


def _text(tiling: Tiling) -> str:
    return ", ".join(f"{key}={value}" for key, value in tiling.values().items())
