"""What the passes did: a table with one row a region, and the same as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tabulate import tabulate

from sptc.passes.normalize import graphs
from sptc.passes.pattern import requires_grad
from sptc.passes.unit import Unit
from sptc.region import AttentionRegion, Decision, FfnSettings, Kind, Refusal, Region, RouterState

Status = Literal["rewritten", "declined", "refused"]


@dataclass(frozen=True)
class RegionReport:
    """One region, or one place that looked like a region. Costs are of forward and backward; None where nothing was estimated."""

    kind: Kind | Literal["graph"]
    status: Status
    module: str  # "model.layers.0.mlp", "" for the root
    source: str  # "modeling_llama.py:174"
    reason: str
    rule: str | None = None  # of a refusal
    computes: str = ""  # the activation, or the mask's predicate
    settings: dict[str, Any] | None = None  # of the sparse form, whether it is used or not
    density: float | None = None  # share that is computed now: 1 if declined
    flops_before: float | None = None
    flops_after: float | None = None
    bytes_before: float | None = None
    bytes_after: float | None = None
    seconds_dense: float | None = None  # predicted
    seconds_sparse: float | None = None  # predicted
    graph: int = 0  # which captured graph


@dataclass(frozen=True)
class Report:
    """All regions of one compile, or of one `explain` or `prepare`. `str(report)` is a table."""

    regions: tuple[RegionReport, ...] = ()
    passes: tuple[tuple[str, float], ...] = ()  # name and seconds, summed over graphs
    notes: tuple[str, ...] = ()
    graphs: int = 0

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Report:
        """The report of captured graphs that went through the passes, at least up to `decide`."""
        return cls.merged(_of_unit(unit) for unit in units)

    @classmethod
    def merged(cls, reports: Iterable[Report]) -> Report:
        """One report of several graphs; a graph break makes several."""
        regions: list[RegionReport] = []
        seconds: dict[str, float] = {}
        notes: dict[str, None] = {}
        count = 0
        for report in reports:
            regions += [replace(r, graph=r.graph + count) for r in report.regions]
            for name, spent in report.passes:
                seconds[name] = seconds.get(name, 0.0) + spent
            notes.update(dict.fromkeys(report.notes))
            count += report.graphs
        return cls(tuple(regions), tuple(seconds.items()), tuple(notes), count)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "graphs": self.graphs,
            "regions": [asdict(r) for r in self.regions],
            "totals": self.totals(),
            "passes": [{"name": name, "seconds": seconds} for name, seconds in self.passes],
            "notes": list(self.notes),
        }

    def totals(self) -> dict[str, float]:
        """Sums over the regions that have costs; seconds as decided."""
        known = [r for r in self.regions if r.seconds_dense is not None]
        sums = {key: sum(getattr(r, key) or 0.0 for r in known) for key in ("flops_before", "flops_after", "bytes_before", "bytes_after")}
        after = sum((r.seconds_sparse if r.status == "rewritten" else r.seconds_dense) or 0.0 for r in known)
        return {**sums, "seconds_before": sum(r.seconds_dense or 0.0 for r in known), "seconds_after": after}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if not self.regions:
            yield f"sptc: no attention or FFN region in {self.graphs} graph{'s' * (self.graphs != 1)}"
        else:
            headers = ("module", "kind", "status", "density", "GFLOP", "after", "MB", "after", "ms dense", "sparse", "source", "why")
            rows = [_row(r) for r in self.regions]
            yield tabulate([*rows, self._total_row()], headers, disable_numparse=True, colalign=_ALIGN)
            done = sum(r.status == "rewritten" for r in self.regions)
            yield f"\n{done} of {len(self.regions)} regions rewritten, {self.graphs} graph{'s' * (self.graphs != 1)}; times are predicted"
        if self.passes:
            yield "passes: " + ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in self.passes)
        yield from (f"note: {note}" for note in self.notes)

    def _total_row(self) -> tuple[str, ...]:
        t = self.totals()
        figures = (t["flops_before"] / 1e9, t["flops_after"] / 1e9, t["bytes_before"] / 1e6, t["bytes_after"] / 1e6)
        seconds = (t["seconds_before"] * 1e3, t["seconds_after"] * 1e3)
        return ("total", "", "", "", *map(_number, (*figures, *seconds)), "", "")


_ALIGN = ("left", "left", "left", *("right",) * 7, "left", "left")


def _row(r: RegionReport) -> tuple[str, ...]:
    def scaled(value: float | None, factor: float) -> str:
        return "" if value is None else _number(value * factor)

    density = "" if r.density is None else _number(r.density)
    figures = [(r.flops_before, 1e-9), (r.flops_after, 1e-9), (r.bytes_before, 1e-6), (r.bytes_after, 1e-6)]
    times = [(r.seconds_dense, 1e3), (r.seconds_sparse, 1e3)]
    why = f"[{r.rule}] {r.reason}" if r.rule else r.reason
    return (r.module or "(root)", r.kind, r.status, density, *(scaled(*pair) for pair in [*figures, *times]), r.source, why)


def _number(value: float) -> str:
    """Three significant digits, without exponents in the range that tables hold."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _of_unit(unit: Unit) -> Report:
    order = {gm.graph: position for position, gm in enumerate(graphs(unit.gm))}
    rows = [(d.region.y, _decided(d)) for d in unit.decisions] + [(r.node, _refused(r)) for r in unit.refusals]
    # A node keeps its sort key when it is erased from its graph.
    rows.sort(key=lambda row: (order.get(row[0].graph, 0), row[0]._sort_key))
    return Report(
        tuple(row for _, row in rows),
        tuple((record.name, record.seconds) for record in unit.records),
        tuple(_notes(unit)),
        1,
    )


def _decided(decision: Decision) -> RegionReport:
    region, dense, sparse = decision.region, decision.dense, decision.sparse
    after = sparse if decision.rewrite else dense
    return RegionReport(
        kind=region.kind,
        status="rewritten" if decision.rewrite else "declined",
        module=region.site.module,
        source=region.site.source,
        reason=decision.reason,
        computes=_computes(region),
        settings=asdict(decision.settings),
        density=decision.settings.density if decision.rewrite else 1.0,
        flops_before=dense.flops,
        flops_after=after.flops,
        bytes_before=dense.bytes,
        bytes_after=after.bytes,
        seconds_dense=dense.seconds,
        seconds_sparse=sparse.seconds,
    )


def _refused(refusal: Refusal) -> RegionReport:
    return RegionReport(refusal.kind, "refused", refusal.site.module, refusal.site.source, refusal.reason, refusal.rule)


def _computes(region: Region) -> str:
    if not isinstance(region, AttentionRegion):
        return region.activation
    operands = [name for name, node in (("boolean mask", region.mask.boolean), ("bias", region.mask.bias)) if node is not None]
    return " and ".join([region.mask.predicate, *operands])


def _notes(unit: Unit) -> Iterator[str]:
    """What a user should know beyond the rows."""
    rewritten = [d.region for d in unit.decisions if d.rewrite]
    bare = [r for r in rewritten if r not in unit.states]
    attention = sum(r.kind == "attention" for r in bare)
    ffn = sum(isinstance(d.settings, FfnSettings) for d in unit.decisions if d.rewrite and d.region not in unit.states)
    if attention and unit.config.attention_selector == "pq":
        yield f"{_regions(attention, 'attention')} by pooled queries; sptc.prepare(model, ...) would add codebooks (selector 'pq')"
    if ffn:
        yield f"{_regions(ffn, 'FFN')} by the means of weights; sptc.prepare(model, ...) would add routers that train"
    if unit.config.ffn_keep is not None and "ffn.keep" in unit.config.given:
        yield from _routed_alike(unit)
    for region, state in unit.states.items():
        if isinstance(state, RouterState) and state.training and not state.trainable:
            yield f"the router of {region.site.module or 'the model'} is frozen: it chooses but does not learn"


def _routed_alike(unit: Unit) -> Iterator[str]:
    """Why regions go without the option ffn.keep; at density 1, and without a loss and gradients, there is nothing to say."""
    chosen = [(d.region, d.settings) for d in unit.decisions if d.rewrite and isinstance(d.settings, FfnSettings)]
    alike = [region for region, settings in chosen if not settings.keep and settings.active < settings.blocks]
    if not alike:
        return
    if unit.counted is None:
        reason = "their graph computes no cross entropy; compile the loss with the model" if any(requires_grad(r.y) for r in alike) else ""
    elif isinstance(unit.counted, str):
        reason = unit.counted
    else:
        reason = "their tokens are not those of the loss, or use one block each"
    if reason:
        yield f"option 'ffn.keep': {len(alike)} FFN region{'s route' if len(alike) != 1 else ' routes'} all tokens alike: {reason}"


def _regions(count: int, kind: str) -> str:
    return f"{count} {kind} region{'s choose' if count != 1 else ' chooses'}"
