"""What a run consists of: stages of cases, each with seconds that it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.gpu.journal import Figures

CONTEXT_DIED = 75  # exit code of a child whose device is lost to it: another one goes on


class OutOfTime(Exception):
    """A case has used up its seconds."""


class Limit:
    """The seconds of a case, which run from now on. A case asks between its rounds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def over(self) -> bool:
        return self.left <= 0

    def check(self) -> None:
        """Raises OutOfTime when the time is over."""
        if self.over():
            raise OutOfTime


@dataclass(frozen=True)
class Case:
    """`rows` yields figures as they are found."""

    name: str
    seconds: float
    rows: Callable[[Limit], Iterable[Figures]]


@dataclass(frozen=True)
class Stage:
    """Cases in order of importance. One process does them, and another one those that are left if it dies."""

    name: str
    seconds: float
    cases: tuple[Case, ...]
    interpreted: bool = True  # in a dry run, where kernels run in Triton's interpreter
