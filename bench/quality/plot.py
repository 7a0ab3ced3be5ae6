"""Held-out loss over steps and over seconds, one figure a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.quality.results import Clock, seconds_at
from bench.quality.training import Record
from bench.quality.variants import DENSE


def plot(records: Sequence[Record], folder: Path, clock: Clock) -> list[Path]:
    """Write `<task>-<model>-<steps>steps.svg` for each; a variant's seeds share a colour. Returns the files."""
    import matplotlib  # for this alone
    from matplotlib.figure import Figure

    colours = matplotlib.color_sequences["tab20"]
    files = []
    for task in sorted({(record.task, record.model, record.budget.steps) for record in records}):
        members = [record for record in records if (record.task, record.model, record.budget.steps) == task]
        variants = sorted({record.variant for record in members}, key=lambda name: (name != DENSE, name))
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
        for record in members:
            index = variants.index(record.variant)
            first = record.seed == min(other.seed for other in members if other.variant == record.variant)
            look = {"color": "black" if record.variant == DENSE else colours[(index - 1) % len(colours)], "marker": ".", "linewidth": 1.2}
            losses = [point.loss for point in record.points]
            over_steps.plot([point.step for point in record.points], losses, label=record.variant if first else None, **look)
            over_seconds.plot(seconds_at(record, clock), losses, **look)
        over_steps.set(xlabel="steps", ylabel="held-out loss", title=f"{task[0]}, {task[1]}")
        over_seconds.set(xlabel=f"seconds of training ({clock})")
        over_steps.legend()
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{task[0]}-{task[1]}-{task[2]}steps.svg")
        figure.savefig(files[-1], metadata={"Date": None})
    return files
