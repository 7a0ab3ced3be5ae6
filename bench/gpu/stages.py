"""The stages of a run, and what each is made of; the names are those of `__main__.NAMES`."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from bench.gpu import flex, kernels, layers, start, training
from bench.gpu.journal import Figures, Journal
from bench.gpu.sizes import DRY, FULL, Sizes
from bench.gpu.stage import Case, Limit, Stage
from bench.kernels import ahead, check, tuning
from bench.kernels.cases import AttentionCase
from bench.kernels.warm import distinct, warm
from sptc.codegen.triton.run.launch import Launch
from sptc.codegen.triton.target import KNOWN, Target
from sptc.codegen.triton.tuning.tiling import asking, using


def stages(dry: bool, journal: Journal) -> tuple[Stage, ...]:
    """All of them, for a GPU or for a dry run on a CPU."""
    sizes = DRY if dry else FULL

    def case(name: str, seconds: float, rows: Callable[..., Iterable[Figures]], *arguments: Any) -> Case:
        return Case(name, seconds * sizes.patience, functools.partial(rows, *arguments))

    def stage(name: str, seconds: float, cases: Iterable[Case], interpreted: bool = True) -> Stage:
        return Stage(name, seconds * sizes.patience, tuple(cases), interpreted)

    attention = [[case(f"{c.name}: {form}", 25, layers.attention, c, form, sizes) for form in layers.ATTENTION] for c in sizes.attention]
    ffn = [[case(f"{name}: {form}", 25, layers.ffn, c, form, sizes) for form in layers.FFN] for name, c in sizes.ffn.items()]
    most_important_first = (*attention[0], *ffn[0], *itertools.chain(*attention[1:], *ffn[1:]))
    name, largest = next(iter(sizes.ffn.items()))
    products = [case(f"{name}: {form}", 10, layers.product, largest, form, sizes) for form in layers.PRODUCTS]
    checks = {c.name: functools.partial(check.check, c) for c in sizes.checks} | {"products of blocks": check.check_products}
    steps = [case(f"n={length}: {way.name}", 60, training.step, length, way, sizes) for length in sizes.lengths for way in training.WAYS]
    return (
        stage("start", 60, (
            case("machine", 30, start.machine, sizes),
            case("tiny kernel", 30, start.tiny_kernel, sizes),
            case("rates", 20, start.rates, sizes),
        )),
        stage("warm", 100, (case("kernels", 95, compile_all, sizes, journal),), interpreted=False),
        stage("correct", 100, (case(f"{c} {_short(t)}", 25, correct, run, t, sizes) for t in sizes.dtypes for c, run in checks.items())),
        stage("kernels", 75, (case(c.name, 20, kernels.kernels, c, sizes, journal) for c in sizes.attention)),
        stage("layers", 110, (*most_important_first, *products)),
        stage("training", 180, (case("calibration", 45, training.calibration, sizes), *steps)),
        stage("tuning", 90, (case(c.name, 60, tune, c, sizes, journal) for c in sizes.attention[:1]), interpreted=False),
        stage("flex", 60, (case(c.name, 60, flex.measure, c, sizes) for c in sizes.attention[1:2] or sizes.attention[:1])),
    )  # fmt: skip


def compile_all(sizes: Sizes, journal: Journal, limit: Limit) -> Iterator[Figures]:
    """Compile what the later stages launch, on all cores. Failures, then how many there were in how many seconds."""
    target = _target(journal)
    began = time.monotonic()
    launches = [launch for c in (*sizes.checks, *sizes.attention) for launch in ahead.launches(c, target, sizes.dtype)]
    launches += [launch for t in sizes.dtypes[1:] for c in sizes.checks for launch in ahead.launches(c, target, t)]
    yield from _warmed(launches[: sizes.kernels], target, began, limit)


def correct(run: Callable[[torch.device, torch.dtype], list[check.Check]], dtype: torch.dtype, sizes: Sizes, _: Limit) -> Iterator[Figures]:
    """How many tensors were compared, the wrong ones, and the one nearest to its bound, as a share of it."""
    checks = run(sizes.device, dtype)
    wrong = [f"{c.tensor} {c.error:.2g} > {c.bound:.2g}" for c in checks if not c.passed]
    worst, share = max(((c.tensor, c.error / c.bound if c.bound else 0.0) for c in checks), key=lambda pair: pair[1])
    yield {"tensors": len(checks), "wrong": wrong, "nearest": worst, "share_of_bound": share}


def tune(case: AttentionCase, sizes: Sizes, journal: Journal, limit: Limit) -> Iterator[Figures]:
    """Compile the candidates of every table that the case asks, then measure them, one table after another."""
    target = _target(journal)
    with asking() as asked:
        ahead.launches(case, target, sizes.dtype)
    candidates: list[Launch] = []
    for question in dict.fromkeys(asked):
        for tiling in question.candidates():
            with using(question.table.template, tiling, question.facts):
                launches = ahead.launches(case, target, sizes.dtype)
            candidates += [launch for launch in launches if launch.spec.template == question.table.template]
    yield from _warmed(candidates[: sizes.kernels], target, time.monotonic(), limit)
    yield from tuning.rows(case, sizes.device, sizes.dtype, limit.check)


def _warmed(launches: Sequence[Launch], target: Target, began: float, limit: Limit) -> Iterator[Figures]:
    """Rows of what failed to compile and of how it went. What takes too long is left out."""
    done, slowest = 0, 0.0
    for result in warm(launches, target, os.cpu_count() or 1, limit.left):
        done, slowest = done + 1, max(slowest, result.seconds)
        if result.error is not None:
            yield {"kernel": result.template, "wrong": [result.error]}
    yield {"compiled": done, "of": len(distinct(launches)), "compile_seconds": time.monotonic() - began, "slowest": slowest}


def _target(journal: Journal) -> Target:
    """As the first stage found it: a process that starts others by forking must not ask the device."""
    found = journal.figure("target")
    return Target(**found) if found else KNOWN["sm_90"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
