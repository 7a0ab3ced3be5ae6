"""What a run gave, the table of both, and `results.json`."""

from __future__ import annotations

import json
import statistics
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
    def accuracy(self) -> float:
        return self.right / self.pieces

    @property
    def step(self) -> float:
        return statistics.median(self.step_seconds[WARM:])

    @property
    def compile_seconds(self) -> float:
        """The first training step, with what is measured before it is compiled, and the first held-out batch, beyond usual ones."""
        return self.step_seconds[0] - self.step + self.batch_seconds[0] - statistics.median(self.batch_seconds[1:])

    def to_dict(self) -> dict[str, Any]:
        derived = {
            "compile_seconds": self.compile_seconds,
            "step_seconds_median": self.step,
            "accuracy": self.accuracy,
        }
        return {**derived, "peak_bytes": self.peak_bytes, "losses": self.losses, "step_seconds": self.step_seconds, "report": self.report}


def table(dense: Outcome, sparse: Outcome) -> str:
    """One row a run, and one that compares them."""
    headers = ["", "compile s", "median step s", "peak MiB", "held-out accuracy %, served dense"]
    rows = [
        [o.name, f"{o.compile_seconds:.1f}", f"{o.step:.3f}", f"{o.peak_bytes / 2**20:.0f}", f"{100 * o.accuracy:.1f}"]
        for o in (dense, sparse)
    ]
    ratios = [
        f"{sparse.compile_seconds / dense.compile_seconds:.2f}x",
        f"{dense.step / sparse.step:.2f}x faster",
        f"{sparse.peak_bytes / dense.peak_bytes:.2f}x",
        f"{100 * (sparse.accuracy - dense.accuracy):+.1f} points",
    ]
    return tabulate([*rows, ["spt against dense", *ratios]], headers, disable_numparse=True, colalign=("left", *["right"] * 4))


def goals(dense: Outcome, sparse: Outcome) -> dict[str, bool]:
    return {
        f"at least {SPEED_GOAL}x faster a step": dense.step / sparse.step >= SPEED_GOAL,
        f"accuracy within {100 * ACCURACY_GOAL:.0f} point": dense.accuracy - sparse.accuracy <= ACCURACY_GOAL,
    }


def show(console: Console, dense: Outcome, sparse: Outcome) -> None:
    """Print what was rewritten, the table, and whether the goals are met; a missed goal is no failure."""
    console.print(sparse.report, table(dense, sparse), sep="\n\n", soft_wrap=True, highlight=False, markup=False)
    for goal, met in goals(dense, sparse).items():
        console.print(f"{'met   ' if met else 'MISSED'} {goal}", style="green" if met else "bold red", highlight=False)


def save(path: Path, dense: Outcome, sparse: Outcome, settings: dict[str, Any]) -> None:
    """Everything measured, as JSON."""
    content = {"settings": settings, "dense": dense.to_dict(), "spt": sparse.to_dict(), "goals": goals(dense, sparse)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
