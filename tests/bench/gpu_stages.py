"""Stages that go wrong in every way a run must survive, for `test_gpu.py`; a run imports them with `--stages`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

from bench.gpu import child
from bench.gpu.journal import Figures, Journal
from bench.gpu.stage import Case, Limit, Stage

child.GRACE = 1.0


def fine(_: Limit) -> Iterator[Figures]:
    yield {"found": 1.0}
    yield {"found": float("nan"), "wrong": []}


def raises(_: Limit) -> Iterator[Figures]:
    yield {"found": 2.0}
    raise RuntimeError("no such kernel")


def dies(_: Limit) -> Iterator[Figures]:
    yield {"found": 3.0}
    os.kill(os.getpid(), signal.SIGKILL)


def goes_on(limit: Limit) -> Iterator[Figures]:
    for i in range(10000):
        yield {"found": float(i)}
        time.sleep(0.05)


def hangs(_: Limit) -> Iterator[Figures]:
    yield {"found": 5.0}
    while True:  # asks nobody
        time.sleep(0.05)


def wrong(_: Limit) -> Iterator[Figures]:
    yield {"tensors": 3, "wrong": ["q 1 > 0.1"]}


def stages(dry: bool, journal: Journal) -> tuple[Stage, ...]:
    bad = [Case(f.__name__, 0.5, f) for f in (fine, raises, dies, goes_on, hangs, wrong)]
    endless = [Case(f"endless {i}", 60.0, goes_on) for i in range(3)]
    return Stage("start", 60.0, tuple(bad)), Stage("correct", 60.0, tuple(endless)), Stage("warm", 0.0, (Case("late", 1.0, fine),))
