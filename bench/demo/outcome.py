"""What the runs gave, the table of all, and `results.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tabulate import tabulate

WARM = 2  # training steps left out of the median: the first compiles, the second still allocates
SPEED_GOAL, ACCURACY_GOAL = 1.5, 0.01


@dataclass
class Outcome:
    """What one run measured; seconds are wall-clock."""

    name: str
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)
    right: int = 0
    pieces: int = 0
    first_bytes: int = 0  # the most that was held before the first step: Python, torch, the model
    peak_bytes: int = 0
    report: str = ""

    def trained(self, loss: float, seconds: float) -> None:
        self.losses.append(loss)
        self.step_seconds.append(seconds)

    def evaluated(self, right: int, pieces: int, seconds: float) -> None:
        self.right += right
        self.pieces += pieces
        self.batch_seconds.append(seconds)

    @property
    def accuracy(self) -> float | None:
        """Share of the held-out pieces; None: not evaluated."""
        return self.right / self.pieces if self.pieces else None

    @property
    def step(self) -> float:
        return statistics.median(self.step_seconds[WARM:])

    @property
    def compile_seconds(self) -> float:
        """The first training step, with what is measured before it is compiled, and the first held-out batch, beyond usual ones."""
        evaluation = self.batch_seconds[0] - statistics.median(self.batch_seconds[1:]) if self.batch_seconds else 0.0
        return self.step_seconds[0] - self.step + evaluation

    def to_dict(self) -> dict[str, Any]:
        derived = {
            "compile_seconds": self.compile_seconds,
            "step_seconds_median": self.step,
            "accuracy": self.accuracy,
        }
        memory = {"first_bytes": self.first_bytes, "peak_bytes": self.peak_bytes}
        return {**derived, **memory, "losses": self.losses, "step_seconds": self.step_seconds, "report": self.report}


Pair = tuple[Outcome, Outcome]  # dense and sparse


def table(pairs: Mapping[str, Pair]) -> str:
    """Of each dtype a row a run, and one that compares them."""
    headers = ["", "compile s", "median step s", "MiB before steps", "peak MiB", "held-out accuracy %, served dense"]
    rows = [row for dtype, pair in pairs.items() for row in _rows(dtype, *pair)]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5))


def _rows(dtype: str, dense: Outcome, sparse: Outcome) -> Iterator[list[str]]:
    for o in (dense, sparse):
        accuracy = "" if o.accuracy is None else f"{100 * o.accuracy:.1f}"
        memory = [f"{held / 2**20:.0f}" for held in (o.first_bytes, o.peak_bytes)]
        yield [f"{o.name}, {dtype}", f"{o.compile_seconds:.1f}", f"{o.step:.3f}", *memory, accuracy]
    points = "" if dense.accuracy is None or sparse.accuracy is None else f"{100 * (sparse.accuracy - dense.accuracy):+.1f} points"
    compared = f"{sparse.compile_seconds / dense.compile_seconds:.2f}x", f"{dense.step / sparse.step:.2f}x faster"
    yield ["spt against dense", *compared, "", f"{sparse.peak_bytes / dense.peak_bytes:.2f}x", points]


def goals(dense: Outcome, sparse: Outcome) -> dict[str, bool]:
    """Of runs that were evaluated."""
    assert dense.accuracy is not None and sparse.accuracy is not None
    return {
        f"at least {SPEED_GOAL}x faster a step": dense.step / sparse.step >= SPEED_GOAL,
        f"accuracy within {100 * ACCURACY_GOAL:.0f} point": dense.accuracy - sparse.accuracy <= ACCURACY_GOAL,
    }


def show(console: Console, pairs: Mapping[str, Pair]) -> None:
    """Print what was rewritten, the table, and whether the first pair meets the goals; a missed goal is no failure."""
    first = next(iter(pairs.values()))
    console.print(first[1].report, table(pairs), sep="\n\n", soft_wrap=True, highlight=False, markup=False)
    for goal, met in goals(*first).items():
        console.print(f"{'met   ' if met else 'MISSED'} {goal}", style="green" if met else "bold red", highlight=False)


def save(path: Path, pairs: Mapping[str, Pair], settings: dict[str, Any]) -> None:
    """Everything measured, as JSON."""
    measured = {dtype: {"dense": dense.to_dict(), "spt": sparse.to_dict()} for dtype, (dense, sparse) in pairs.items()}
    content = {"settings": settings, **measured, "goals": goals(*next(iter(pairs.values())))}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
