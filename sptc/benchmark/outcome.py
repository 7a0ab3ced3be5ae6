"""What a benchmark found, and the figures that follow from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sptc.benchmark.child.worker import Check
from sptc.benchmark.variants import Variant

FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Outcome:
    """What one variant took. `turns` holds (wall, processor) seconds of steps, a list a turn; the turns of all variants belong together."""

    variant: Variant
    check: Check | None = None
    compile_cold: float | None = None  # seconds of the first step beyond a usual one, without compiled code
    compile_warm: float | None = None  # with what an earlier process left on disk
    turns: list[list[tuple[float, float]]] = field(default_factory=list)
    rest_mib: float | None = None
    step_mib: float | None = None  # the most that a step takes beyond what rests
    kinds: dict[str, float] | None = None  # shares of a step by kind of operator
    report: dict[str, Any] | None = None  # of backend "spt"
    failed: str | None = None  # why there are no figures, or not all
    trace: str = ""

    @property
    def timed(self) -> bool:
        return bool(self.turns) and self.failed is None

    @property
    def sound(self) -> bool:
        """Nothing failed, and what must equal the dense model does as far as is known."""
        return self.failed is None and not (self.variant.exact and self.check is not None and self.check.passed is False)

    def wall(self) -> Spread:
        return Spread.of([wall for turn in self.turns for wall, _ in turn])

    def processor(self) -> Spread:
        return Spread.of([processor for turn in self.turns for _, processor in turn])

    def predicted_gain(self) -> float | None:
        """Seconds that the cost model says a step saves in the regions that were rewritten."""
        if self.report is None:
            return None
        totals = self.report["totals"]
        return totals["seconds_before"] - totals["seconds_after"]

    def rewritten(self) -> tuple[int, int]:
        """Regions that were rewritten, of how many that were found."""
        regions = [] if self.report is None else [r for r in self.report["regions"] if r["status"] != "refused"]
        return sum(r["status"] == "rewritten" for r in regions), len(regions)


def ratio(base: Outcome, other: Outcome, which: int = 0) -> Spread:
    """How many times faster `other` is, turn by turn: by the wall clock, or by processor time (`which` 1)."""

    def middle(turn: list[tuple[float, float]]) -> float:
        return statistics.median(step[which] for step in turn)

    return Spread.of([middle(a) / max(middle(b), 1e-9) for a, b in zip(base.turns, other.turns, strict=False)])


def paid_back(steps: float | None) -> str:
    """`Case.paid_back` in words."""
    if steps is None:
        return ""
    return "never" if math.isinf(steps) else "at once" if steps == 0 else f"{steps:.0f} steps"


@dataclass
class Case:
    """All variants at one length."""

    batch: int
    length: int | None  # tokens a sequence; None where the batch is not made here
    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.length}" if self.length is not None else "its batch"

    @property
    def baseline(self) -> Outcome | None:
        """The fastest dense variant."""
        return self._fastest(lambda outcome: outcome.variant.dense)

    @property
    def inductor(self) -> Outcome | None:
        """The fastest variant by Inductor, which a predicted gain is told against."""
        return self._fastest(lambda outcome: outcome.variant.backend == "inductor") or self.baseline

    def named(self, name: str) -> Outcome | None:
        return next((o for o in self.outcomes if o.variant.name == name and o.timed), None)

    def _fastest(self, wanted: Callable[[Outcome], bool]) -> Outcome | None:
        timed = [o for o in self.outcomes if o.timed and wanted(o)]
        return min(timed, key=lambda o: o.wall().median, default=None)

    def paid_back(self, outcome: Outcome) -> float | None:
        """Steps after which a cold compile and steps take less than the best dense variant does (that one: than eager); inf: never."""
        base = self.named("eager") if outcome is self.baseline else self.baseline
        if base is None or base is outcome or not outcome.timed or outcome.compile_cold is None or base.compile_cold is None:
            return None
        more, saved = outcome.compile_cold - base.compile_cold, base.wall().median - outcome.wall().median
        if more <= 0:
            return 0.0 if saved >= 0 else None
        return math.ceil(more / saved) if saved > 0 else math.inf

    def measured_gain(self, outcome: Outcome) -> float | None:
        """Seconds that a step saves against Inductor."""
        if self.inductor is None or not outcome.timed:
            return None
        return self.inductor.wall().median - outcome.wall().median

    def headline(self) -> str:
        """One sentence: the sparsest default against the best dense variant, and what of it is no sparsity."""
        base = self.baseline
        best = next((o for name in ("spt-plan", "spt") if (o := self.named(name)) is not None), None)
        if best is None:
            best = self._fastest(lambda outcome: not outcome.variant.exact)
        if base is None or best is None:
            return f"{self.name}: nothing to compare"
        gain = ratio(base, best)
        faster = f"{best.variant.name} is {gain.median:.2f}x as fast as {base.variant.name}, the best dense variant"
        text = f"{self.name}: {faster} ({gain.low:.2f} to {gain.high:.2f})"
        one = next((o for o in self.outcomes if o.variant.density_one and o.timed), None)
        return text + (f"; at density 1, without sparsity, {ratio(base, one).median:.2f}x" if one is not None else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "length": self.length,
            "baseline": None if self.baseline is None else self.baseline.variant.name,
            "headline": self.headline(),
            "notes": self.notes,
            "variants": [self._row(outcome) for outcome in self.outcomes],
        }

    def _row(self, o: Outcome) -> dict[str, Any]:
        base = self.baseline
        row: dict[str, Any] = {
            "name": o.variant.name,
            "backend": o.variant.backend,
            "options": dict(o.variant.options),
            "mode": o.variant.mode,
            "precision": o.variant.precision,
            "exact": o.variant.exact,
            "failed": o.failed,
            "trace": o.trace or None,
            "check": None if o.check is None else {**asdict(o.check), "bound": o.check.bound, "passed": o.check.passed},
            "compile_seconds": {"cold": o.compile_cold, "warm": o.compile_warm},
            "memory_mib": {"rest": o.rest_mib, "step": o.step_mib},
            "kinds": o.kinds,
            "regions": None if o.report is None else dict(zip(("rewritten", "found"), o.rewritten(), strict=True)),
            "report": o.report,
            "steps": [{"wall": [w for w, _ in turn], "processor": [p for _, p in turn]} for turn in o.turns],
        }
        if o.timed:
            row["wall_seconds"], row["processor_seconds"] = asdict(o.wall()), asdict(o.processor())
            row["paid_back_steps"], row["paid_back"] = self.paid_back(o), paid_back(self.paid_back(o))
            row["gain_seconds"] = {"predicted": o.predicted_gain(), "measured": None if o.variant.dense else self.measured_gain(o)}
            if base is not None:
                row["faster"] = {"wall": asdict(ratio(base, o)), "processor": asdict(ratio(base, o, 1))}
        return row


@dataclass
class Bench:
    """A finished benchmark. `str(bench)` is its tables."""

    facts: dict[str, Any]  # device, versions, commit, command
    settings: dict[str, Any]
    cases: list[Case]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON: numbers that are not finite are None."""
        return _finite({"format": FORMAT, **self.facts, "settings": self.settings, "cases": [case.to_dict() for case in self.cases]})

    def __str__(self) -> str:
        from sptc.benchmark.show.table import tables

        return tables(self)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
