"""Two plots of a benchmark: step time and memory over length, and which operators take a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sptc.benchmark.show.page import KINDS
from sptc.benchmark.variants import BenchError


def check_plot(path: str) -> None:
    """Raises BenchError if `path` can't be plotted to."""
    if Path(path).suffix not in (".png", ".svg"):
        raise BenchError(f"--plot {path!r}: the name must end in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'sptc[plot]'; --html needs nothing")


def plot(bench: Mapping[str, Any], path: str) -> None:
    """Plot `Bench.to_dict()`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = bench["cases"]
    names = [v["name"] for v in cases[0]["variants"]]
    figure, (time, memory, shares) = plt.subplots(1, 3, figsize=(15, 4.5), width_ratios=(1, 1, 1.3), layout="constrained")
    for name in names:
        rows = [(case, v) for case in cases for v in case["variants"] if v["name"] == name and v["failed"] is None and "wall_seconds" in v]
        if not rows:
            continue
        lengths = [case["length"] or case["batch"] for case, _ in rows]
        wall = [v["wall_seconds"] for _, v in rows]
        middle = [w["median"] for w in wall]
        around = [[m - w["low"] for m, w in zip(middle, wall, strict=True)], [w["high"] - m for m, w in zip(middle, wall, strict=True)]]
        time.errorbar(lengths, middle, around, label=name, marker="o", capsize=3)
        weighed = [
            (length, v["memory_mib"]["step"]) for length, (_, v) in zip(lengths, rows, strict=True) if v["memory_mib"]["step"] is not None
        ]
        memory.plot([length for length, _ in weighed], [mib for _, mib in weighed], marker="o", label=name)
    for axes, label in ((time, "seconds a step"), (memory, "MiB that a step takes beyond what rests")):
        axes.set(xlabel="tokens a sequence" if cases[0]["length"] else "its batch", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.legend()
    _shares(shares, cases[-1])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _shares(axes: Any, case: Mapping[str, Any]) -> None:
    """Bars as long as steps, cut by kinds of operators."""
    rows = [v for v in case["variants"] if v["failed"] is None and v["kinds"]]
    left = [0.0] * len(rows)
    for kind, color in KINDS.items():
        widths = [v["kinds"][kind] * v["wall_seconds"]["median"] for v in rows]
        axes.barh([v["name"] for v in rows], widths, left=left, color=color, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel=f"seconds a step by kind of operator{', ' + str(case['length']) + ' tokens' if case['length'] else ''}")
    axes.legend()
