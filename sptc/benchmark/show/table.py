"""The tables of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from sptc.benchmark.child.worker import Check
from sptc.benchmark.outcome import Case, Outcome, Spread, paid_back, ratio

if TYPE_CHECKING:
    from sptc.benchmark.outcome import Bench

Rows = list[tuple[str, ...]]
TIMES = (
    *("variant", "ms a step", "quartiles", "processor ms", "faster"),
    *("quartiles", "by processor time", "regions", "gain predicted / measured ms"),
)
COSTS = (
    *("variant", "MiB at rest", "a step adds", "compile s cold", "warm", "paid back after"),
    *("loss", "gradient norm", "cosine", "moved", "check"),
)


def tables(bench: Bench) -> str:
    return "\n".join(_lines(bench))


def _lines(bench: Bench) -> Iterator[str]:
    for case in bench.cases:
        yield f"{case.name}, {bench.settings['dtype'] or 'as the model is'}"
        yield _table(times(case), TIMES)
        yield ""
        yield _table(costs(case), COSTS)
        yield ""
        for outcome in case.outcomes:
            if outcome.failed is not None:
                yield f"failed: {outcome.variant.name}: {outcome.failed}"
        yield from (f"note: {note}" for note in case.notes)
    yield from (case.headline() for case in bench.cases)
    facts = bench.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield f"{facts['device']}, {facts['threads']} threads; {versions}; commit {facts['commit'] or 'unknown'}"


def _table(rows: Rows, headers: Sequence[str]) -> str:
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))


def times(case: Case) -> Rows:
    """Steps of each variant, and how they compare with the best dense one's."""
    rows: Rows = []
    for o in case.outcomes:
        if not o.timed:
            rows.append((o.variant.name, "failed", *[""] * (len(TIMES) - 2)))
            continue
        wall, base = o.wall(), case.baseline
        faster = ("", "", "")
        if base is not None and o is base:
            faster = ("best dense", "", "")
        elif base is not None:
            by_wall = ratio(base, o)
            faster = (f"{by_wall.median:.2f}x", _quartiles(by_wall, 1, 2), f"{ratio(base, o, 1).median:.2f}x")
        regions = "" if o.variant.dense else "{} of {}".format(*o.rewritten())
        figures = (f"{wall.median * 1e3:.1f}", _quartiles(wall, 1e3, 1), f"{o.processor().median * 1e3:.1f}")
        rows.append((o.variant.name, *figures, *faster, regions, _gain(case, o)))
    return rows


def costs(case: Case) -> Rows:
    """What else a variant costs, and whether it computes what it should."""
    rows: Rows = []
    for o in case.outcomes:
        rest, step = ("" if value is None else f"{value:.0f}" for value in (o.rest_mib, o.step_mib))
        cold, warm = ("" if value is None else f"{value:.1f}" for value in (o.compile_cold, o.compile_warm))
        rows.append((o.variant.name, rest, step, cold, warm, paid_back(case.paid_back(o)), *_check(o.check)))
    return rows


def _quartiles(spread: Spread, scale: float, digits: int) -> str:
    return f"{spread.low * scale:.{digits}f} to {spread.high * scale:.{digits}f}"


def _gain(case: Case, o: Outcome) -> str:
    predicted, measured = o.predicted_gain(), case.measured_gain(o)
    if o.variant.dense or predicted is None or measured is None:
        return ""
    return f"{predicted * 1e3:.0f} / {measured * 1e3:.0f}"


def _check(check: Check | None) -> tuple[str, ...]:
    if check is None:
        return ("",) * 5
    cosine = "" if check.cosine is None else f"{check.cosine:.4f}"
    return (f"{check.loss:.5g}", f"{check.norm:.4g}", cosine, f"{check.moved} of {check.trained}", verdict(check))


def verdict(check: Check) -> str:
    """What a variant's gradients are off by, and whether that is allowed."""
    if check.left_out is not None:
        return "not compared"
    if check.error is None or check.passed is None:
        return ""
    verdict = f"{'passed' if check.passed else 'FAILED'}: {check.error:.1e}, {check.bound:.1e} allowed"
    return verdict if check.error <= check.bound else f"{verdict}; {check.norm_error:.1e} of the norm"
