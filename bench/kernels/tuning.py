"""Measuring the tile sizes of every template on this GPU, for the shapes that `--gpu` times."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor

from bench.kernels import attention, ffn
from bench.kernels.cases import AttentionCase, attention_operands, ffn_operands, named
from bench.kernels.clock import milliseconds
from bench.kernels.steps import attention_step, ffn_step
from sptc.codegen.tune import Choice, tune


def run(only: str) -> int:
    """Print what was chosen; 0. Questions that have an answer on disk are not measured again."""
    if not torch.cuda.is_available():
        print("tile sizes are measured on a GPU, and torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    choices: list[Choice] = []
    for case in named((*attention.CASES, *ffn.CASES), only):
        with torch.no_grad():
            choices += tune(step(case, device, torch.bfloat16), functools.partial(milliseconds, device=device))
        print(f"{case.name}: {len(choices)} questions answered", file=sys.stderr, flush=True)
    print(tabulate([_row(choice) for choice in choices], ["template", "facts", "best", "ms", "default", "ms"]))
    return 0


def step(case: attention.AttentionCase | ffn.FfnCase, device: torch.device, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """One training step of the op of a case, on operands made now."""
    if isinstance(case, AttentionCase):
        return functools.partial(attention_step, case, attention_operands(case, device, dtype))
    return functools.partial(ffn_step, case, ffn_operands(case, device, dtype))


def _row(choice: Choice) -> tuple[str, str, str, float, str, float]:
    times = dict(choice.milliseconds)
    default = next(iter(times))
    facts = ", ".join(f"{key}={value}" for key, value in choice.question.facts)
    texts = [", ".join(f"{key}={value}" for key, value in tiling.values().items()) for tiling in (choice.best, default)]
    return choice.question.table.template, facts, texts[0], times[choice.best], texts[1], times[default]
