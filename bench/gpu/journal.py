"""Results of a run, one JSON line each, on disk as soon as they are known, and one printed line each."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
_WIDTH = 220  # of a printed line; the file holds all


@dataclass(frozen=True)
class Journal:
    """A file that several processes append to. `run` marks the rows of one run, `start` is its beginning by `time.monotonic`.

    A row holds run, stage, case, at (seconds since the start) and figures. The last row of a case has a `status`: "ok", "failed" (it
    raised), "stopped" (its time was over), "died" (its process did), or "not run".
    """

    path: Path
    run: str
    start: float

    def write(self, stage: str, case: str, figures: Figures) -> None:
        """Append a row and print it. When this returns, the row survives whatever becomes of this process."""
        row = {"run": self.run, "stage": stage, "case": case, "at": round(time.monotonic() - self.start, 2), **_plain(figures)}
        line = json.dumps(row, default=str).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # what was written before may have been cut off
            os.write(file, b"\n" * torn + line)
            os.fsync(file)
        finally:
            os.close(file)
        shown = " ".join(f"{key}={short(value)}" for key, value in figures.items() if key != "trace" and value is not None)
        print(f"{row['at']:6.1f} s  {stage}: {case}: {shown}".replace("\n", " ")[:_WIDTH], flush=True)

    def rows(self, stage: str | None = None) -> list[Figures]:
        """The rows of this run so far, of one stage if given. A line that was cut off is left out."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["run"] == self.run and stage in (None, row["stage"]):
                found.append(row)
        return found

    def ended(self, stage: str) -> set[str]:
        """The cases of a stage that need not be run any more."""
        return {row["case"] for row in self.rows(stage) if "status" in row}

    def figure(self, name: str) -> Any:
        """The newest value of a figure, None if there is none."""
        return next((row[name] for row in reversed(self.rows()) if name in row), None)


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(figures: Figures) -> Figures:
    """JSON has no infinities and NaNs: they are written by name."""
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in figures.items()}
