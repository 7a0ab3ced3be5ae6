"""Tile sizes, warps and stages of a template: a short table for each architecture, pruned by what a device holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import sympy

from sptc.codegen.triton.target import Target
from sptc.codegen.triton.tuning import measured
from sptc.ir.errors import SptcError

Facts = tuple[tuple[str, int], ...]


class TilingError(SptcError, ValueError):
    """No candidate of a table fits the device."""


@dataclass(frozen=True)
class Tiling:
    """One candidate: values of the tile constants of a template, and Triton's launch options."""

    constants: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, num_warps: int, num_stages: int, **constants: int) -> Tiling:
        return cls(tuple(sorted(constants.items())), num_warps, num_stages)

    def values(self) -> dict[str, int]:
        return {**dict(self.constants), "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, eq=False)
class Table:
    """The candidates of one template, best first.

    `candidates` goes by the name of a target ("sm_90"); "" serves all others. `shared_memory` (bytes of a program) and `registers` (32-bit
    ones of a thread) are expressions in the tile constants, `num_warps`, `num_stages`, `warp_size`, and the facts that `choose` is given.
    """

    template: str
    candidates: Mapping[str, tuple[Tiling, ...]]
    shared_memory: sympy.Expr
    registers: sympy.Expr

    def fitting(self, target: Target, **facts: int) -> tuple[Tiling, ...]:
        """Candidates that fit `target`, best first."""
        return self._fitting(target, tuple(sorted(facts.items())), spills=False)

    def running(self, target: Target, **facts: int) -> tuple[Tiling, ...]:
        """Candidates that `target` has the shared memory for: with too many registers a kernel is slow, or the estimate of them wrong."""
        return self._fitting(target, tuple(sorted(facts.items())), spills=True)

    def choose(self, target: Target, **facts: int) -> Tiling:
        """The candidate that was measured best on this very device (`codegen/triton/tuning/tune.py`), else the first that fits.

        Raises:
            TilingError: none fits; names the template, the facts and the device's limits.
        """
        question = Question(self, target, tuple(sorted(facts.items())))
        asked = _asked.get()
        if asked is not None:
            asked.append(question)
        for template, only, tiling in _forced.get():
            if template == self.template and only in (None, question.facts):
                return tiling
        rows = self._fitting(target, question.facts, spills=False)
        if not rows:
            known = ", ".join(f"{key}={value}" for key, value in facts.items())
            raise TilingError(
                f"no tile sizes of kernel {self.template!r} fit {target.name} ({target.shared_memory} bytes of shared memory, "
                f"{target.registers} registers) with {known}"
            )
        return question.answer() or rows[0]

    @functools.lru_cache(maxsize=256)  # noqa: B019  tables live as long as the process; a launch must not wait for sympy
    def _fitting(self, target: Target, facts: Facts, spills: bool) -> tuple[Tiling, ...]:
        rows = self.candidates.get(target.name, self.candidates[""])
        return tuple(tiling for tiling in rows if self._fits(tiling, target, dict(facts), spills))

    def _fits(self, tiling: Tiling, target: Target, facts: Mapping[str, int], spills: bool) -> bool:
        values = {**tiling.values(), "warp_size": target.warp_size, **facts}

        def needs(expr: sympy.Expr) -> int:
            return int(expr.subs({symbol: values[symbol.name] for symbol in expr.free_symbols}))

        return needs(self.shared_memory) <= target.shared_memory and (spills or needs(self.registers) <= target.registers)


@dataclass(frozen=True)
class Question:
    """One call of `Table.choose`."""

    table: Table
    target: Target
    facts: Facts

    def candidates(self) -> tuple[Tiling, ...]:
        """What is worth measuring: an estimate of registers decides only where nothing was measured."""
        return self.table.running(self.target, **dict(self.facts))

    def answer(self) -> Tiling | None:
        """The candidate measured best, if one was, on this device, and it still is a candidate."""
        best = measured.recall(self.target.device, self.table.template, self.facts) if self.target.device else None
        return None if best is None else next((tiling for tiling in self.candidates() if tiling.values() == best), None)


_asked: ContextVar[list[Question] | None] = ContextVar("asked", default=None)
_forced: ContextVar[tuple[tuple[str, Facts | None, Tiling], ...]] = ContextVar("forced", default=())


@contextmanager
def asking() -> Iterator[list[Question]]:
    """Collect what tables are asked."""
    questions: list[Question] = []
    token = _asked.set(questions)
    try:
        yield questions
    finally:
        _asked.reset(token)


@contextmanager
def using(template: str, tiling: Tiling, facts: Facts | None = None) -> Iterator[None]:
    """Make the table of `template` answer `tiling`, to these facts or to all: for measuring it, and for tests with small tiles."""
    token = _forced.set(((template, facts, tiling), *_forced.get()))
    try:
        yield
    finally:
        _forced.reset(token)
