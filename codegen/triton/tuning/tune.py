"""Measuring tile sizes: every candidate of a table that fits, timed once on the device. `python -m bench.kernels --tune` runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from triton.runtime.errors import OutOfResources

from sptc.codegen.triton.tuning import measured
from sptc.codegen.triton.tuning.tiling import Question, Tiling, asking, using


@dataclass(frozen=True)
class Choice:
    """The best candidate for one question, and milliseconds of each: infinite for one that turned out not to fit."""

    question: Question
    best: Tiling
    milliseconds: tuple[tuple[Tiling, float], ...]


def tune(run: Callable[[], object], milliseconds: Callable[[Callable[[], object]], float]) -> list[Choice]:
    """Measure what `run` asks of tables and keep the answers on disk. What has an answer there, or one candidate only, is not measured.

    Args:
        run: launches kernels; the same ones each time. One of its kernels is varied at a time, the others run as they are chosen so far.
        milliseconds: the time of a call, with what warms it up left out.

    Raises:
        OutOfResources: no candidate fits the device, though the table thinks so.
    """
    return list(tune_each(run, milliseconds))


def tune_each(run: Callable[[], object], milliseconds: Callable[[Callable[[], object]], float]) -> Iterator[Choice]:
    """What `tune` does, one question after another: what was answered is kept if the caller stops."""
    with asking() as asked:
        run()
    questions = [q for q in dict.fromkeys(asked) if q.target.device and len(q.candidates()) > 1 and q.answer() is None]
    for question in questions:
        yield _measure(question, run, milliseconds)


def _measure(question: Question, run: Callable[[], object], milliseconds: Callable[[Callable[[], object]], float]) -> Choice:
    template, times, failure = question.table.template, {}, None
    for tiling in question.candidates():
        with using(template, tiling, question.facts):
            try:
                times[tiling] = milliseconds(run)
            except OutOfResources as error:  # the table's estimate was too low
                times[tiling], failure = math.inf, error
    best = min(times, key=times.__getitem__)
    if failure is not None and times[best] == math.inf:
        raise failure
    record = {_text(tiling): time for tiling, time in times.items() if time < math.inf}
    measured.remember(question.target.device, template, question.facts, best.values(), record)
    return Choice(question, best, tuple(times.items()))


def _text(tiling: Tiling) -> str:
    return ", ".join(f"{key}={value}" for key, value in tiling.values().items())
