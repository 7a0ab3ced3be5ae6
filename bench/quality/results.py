"""Records on disk, curves at equal steps and at equal seconds, and the table of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tabulate import tabulate

from bench.quality.tasks import Budget
from bench.quality.training import Point, Record
from bench.quality.variants import DENSE

FOLDER = Path("bench/results/quality")
COMPILING = 2  # steps that count as long as a usual one: the first compiles, the second still allocates
Clock = Literal["wall", "cpu"]
Group = tuple[str, str, Budget, str]  # what runs must share to be compared; a budget whose learning rate is 0 stands for any


def path_of(folder: Path, record: Record) -> Path:
    """One file a run."""
    budget, variant = record.budget, record.variant.replace("/", "_")
    steps = f"{budget.steps}steps{'-falling' if budget.falling else ''}-lr{budget.learning_rate:g}"
    return folder / f"{record.task}-{record.model}-{steps}-{variant}-seed{record.seed}.json"


def done(folder: Path, planned: Record) -> bool:
    """Whether the folder holds this run, with the same options, budget and compiler: a long command that was interrupted goes on."""
    path = path_of(folder, planned)
    if not path.exists():
        return False
    found = _read(path)
    return (found.options, found.budget, found.compile) == (planned.options, planned.budget, planned.compile)


def save(folder: Path, record: Record) -> Path:
    """Write the run's file, in place of an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, record)
    path.write_text(json.dumps(_rounded(record.to_dict())) + "\n", encoding="utf-8")
    return path


def load(folder: Path) -> list[Record]:
    """All records in a folder, by file name."""
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> Record:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["budget"] = Budget(**content["budget"])
    for key in ("points", "dense_points"):
        content[key] = [Point(**point) for point in content[key]]
    return Record(**content)


def _rounded(value: object) -> object:
    """Floats to six digits: figures that are compared by a thousandth need no more, and files stay small."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def seconds_at(record: Record, clock: Clock) -> list[float]:
    """Seconds of training before each of the record's points, compiling left out."""
    steps = list(record.wall_seconds if clock == "wall" else record.cpu_seconds)
    usual = statistics.median(steps[COMPILING:] or steps)
    steps[:COMPILING] = [usual] * len(steps[:COMPILING])
    return [sum(steps[: point.step]) for point in record.points]


def step_seconds(record: Record, clock: Clock) -> float:
    """The median step."""
    steps = record.wall_seconds if clock == "wall" else record.cpu_seconds
    return statistics.median(steps[COMPILING:] or steps)


def interpolate(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear through (xs, ys), xs ascending; the first or last value beyond the ends."""
    if at <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return ys[-1]


def at_equal_seconds(record: Record, dense: Record, clock: Clock) -> float:
    """Relative difference of the held-out loss to dense, at the moment at which the faster of the two ends."""
    mine, theirs = seconds_at(record, clock), seconds_at(dense, clock)
    end = min(mine[-1], theirs[-1])
    loss = interpolate(end, mine, [point.loss for point in record.points])
    other = interpolate(end, theirs, [point.loss for point in dense.points])
    return loss / other - 1


HEADERS = (
    "variant",
    "rate",
    "seeds",
    "loss",
    "against dense %",
    "accuracy %",
    "points",
    "loss at start",
    "evaluated dense: loss",
    "against dense %",
    "step s",
    "equal seconds: against dense %",
)


def table(records: Iterable[Record], clock: Clock) -> str:
    """One table a group of runs that can be compared: losses and accuracies on held-out text after the last step.

    A row for each variant and learning rate; all are compared with dense LoRA at its best rate.
    """
    groups: dict[Group, list[Record]] = {}
    for record in records:
        any_rate = replace(record.budget, learning_rate=0.0)
        groups.setdefault((record.task, record.model, any_rate, record.compile), []).append(record)
    parts = []
    for (task, model, budget, how), members in groups.items():
        rate = "a falling learning rate" if budget.falling else "a constant learning rate"
        title = f"{task}: {model}, {budget.steps} steps of {budget.batch}, {rate}, compiled by {how}"
        rows = _rows(members, clock)
        parts.append(f"{title}\n\n{tabulate(rows, HEADERS, tablefmt='github', disable_numparse=True)}")
    return "\n\n".join(parts)


def _rows(records: Sequence[Record], clock: Clock) -> list[list[str]]:
    rows: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        rows.setdefault((record.variant, record.budget.learning_rate), []).append(record)
    best = min((members for (name, _), members in rows.items() if name == DENSE), key=_final_loss, default=[])
    dense = {record.seed: record for record in best}
    order = sorted(rows, key=lambda row: (row[0] != DENSE, row))
    return [_row(name, rate, rows[name, rate], dense, clock) for name, rate in order]


def _final_loss(records: Sequence[Record]) -> float:
    return statistics.mean(record.dense_points[-1].loss for record in records)


def _row(name: str, rate: float, records: Sequence[Record], dense: dict[int, Record], clock: Clock) -> list[str]:
    """Differences are taken seed by seed, so that what a seed does to both is no part of their spread.

    At equal seconds a falling learning rate has not fallen yet, so that runs of equal steps say nothing there.
    """
    paired = [(record, dense[record.seed]) for record in records if record.seed in dense and record is not dense[record.seed]]
    steady = [pair for pair in paired if not pair[0].budget.falling]

    def of(value: Callable[[Record], float], digits: int, scale: float = 1.0) -> str:
        return shown([scale * value(record) for record in records], digits)

    def against(value: Callable[[Record, Record], float], digits: int, pairs: Sequence[tuple[Record, Record]] = paired) -> str:
        return shown([100 * value(record, other) for record, other in pairs], digits, sign=True)

    return [
        name,
        f"{rate:g}",
        str(len(records)),
        of(lambda r: r.points[-1].loss, 4),
        against(lambda r, d: r.points[-1].loss / d.points[-1].loss - 1, 2),
        of(lambda r: r.points[-1].accuracy, 1, 100),
        against(lambda r, d: r.points[-1].accuracy - d.points[-1].accuracy, 1),
        of(lambda r: r.points[0].loss, 4),
        of(lambda r: r.dense_points[-1].loss, 4) if name != DENSE else "",
        against(lambda r, d: r.dense_points[-1].loss / d.points[-1].loss - 1, 2),
        of(lambda r: step_seconds(r, clock), 2),
        against(lambda r, d: at_equal_seconds(r, d, clock), 2, steady),
    ]


def shown(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """Mean and standard deviation; nothing for no value, no deviation for one."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
