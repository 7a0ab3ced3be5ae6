"""What the passes did: a table with one row a region, and the same as data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tabulate import tabulate
from torch import fx

from sptc.ir.region import AttentionRegion, Decision, FfnSettings, Kind, LossRegion, Refusal, Region, RouterState
from sptc.passes.graph.frame import graphs
from sptc.passes.graph.pattern import requires_grad, same_size, shape
from sptc.passes.unit import Unit

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
    kept_before: float | None = None  # bytes that forward keeps for backward
    kept_after: float | None = None
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
    breaks: tuple[str, ...] = ()  # where Dynamo ended a graph before the model's end, and why
    first: tuple[int, ...] = ()  # for each graph: the first that was compiled of the same code, for other sizes or another mode
    unmatched: tuple[str, ...] = ()  # patterns of option `exclude` that name no region

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Report:
        """The report of captured graphs that went through the passes, at least up to `decide`."""
        return cls.merged(_of_unit(unit) for unit in units)

    @classmethod
    def merged(cls, reports: Iterable[Report], notes: Iterable[str] = (), first: Sequence[int] | None = None) -> Report:
        """One report of several graphs; graph breaks and recompiles make several.

        Args:
            reports: of the graphs, in the order of compiling.
            notes: what is to be said of all of them together.
            first: for each graph, the earlier one of the same code and the same parameters, or itself; None: no graph repeats another.
        """
        reports = list(reports)
        regions: list[RegionReport] = []
        seconds: dict[str, float] = {}
        said: dict[str, None] = {}
        own: list[int] = []
        for report in reports:
            regions += [replace(r, graph=r.graph + len(own)) for r in report.regions]
            for name, spent in report.passes:
                seconds[name] = seconds.get(name, 0.0) + spent
            said.update(dict.fromkeys(report.notes))
            own += [graph + len(own) for graph in report.first]
        breaks = dict.fromkeys(where for report in reports for where in report.breaks)
        unmatched = [p for p in reports[0].unmatched if all(p in report.unmatched for report in reports)] if reports else []
        said.update(dict.fromkeys(notes))
        return cls(
            tuple(regions),
            tuple(seconds.items()),
            tuple(said),
            len(own),
            tuple(breaks),
            tuple(own if first is None else first),
            tuple(unmatched),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "graphs": self.graphs,
            "breaks": list(self.breaks),
            "regions": [asdict(r) for r in self.regions],
            "totals": self.totals(),
            "passes": [{"name": name, "seconds": seconds} for name, seconds in self.passes],
            "notes": self._all_notes(),
        }

    def totals(self) -> dict[str, float]:
        """Sums over the regions that have costs, each counted once, at its largest sizes; seconds as decided."""
        known = [_largest(rows) for rows in self._by_region() if any(r.seconds_dense is not None for r in rows)]
        sums = {key: sum(getattr(r, key) or 0.0 for r in known) for key in _SUMMED}
        after = sum((r.seconds_sparse if r.status == "rewritten" else r.seconds_dense) or 0.0 for r in known)
        return {**sums, "seconds_before": sum(r.seconds_dense or 0.0 for r in known), "seconds_after": after}

    def _by_region(self) -> list[list[RegionReport]]:
        """The rows of each region: one for each graph that was compiled of its code."""
        numbers: Counter[Any] = Counter()
        groups: dict[Any, list[RegionReport]] = {}
        for r in self.regions:
            key = (r.kind, r.module, r.source)
            numbers[r.graph, key] += 1
            first = self.first[r.graph] if self.first else r.graph
            groups.setdefault((first, *key, numbers[r.graph, key]), []).append(r)
        return list(groups.values())

    def _all_notes(self) -> list[str]:
        return [*self.notes, *(f"option 'exclude': {pattern!r} names no region" for pattern in self.unmatched)]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        apart = len(set(self.first)) if self.first else self.graphs
        graphs = f"{self.graphs} graph{'s' * (self.graphs != 1)}"
        if apart != self.graphs:
            graphs += f", {self.graphs - apart} of them of the same code for other sizes or in another mode"
        if apart > 1:
            yield f"sptc: the model is in {apart} graphs; no region reaches from one into another"
            yield from (f"break: {where}" for where in self.breaks)
        if not self.regions:
            yield f"sptc: no attention or FFN region in {graphs}"
        else:
            headers = ("module", "kind", "status", "density", *_FIGURES, "source", "why")
            groups = self._by_region()
            yield tabulate([*map(_row, groups), self._total_row()], headers, disable_numparse=True, colalign=_ALIGN)
            done = sum(any(r.status == "rewritten" for r in rows) for rows in groups)
            yield f"\n{done} of {len(groups)} regions rewritten, {graphs}; times and what is kept for backward are predicted"
        if self.passes:
            yield "passes: " + ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in self.passes)
        yield from (f"note: {note}" for note in self._all_notes())

    def _total_row(self) -> tuple[str, ...]:
        t = self.totals()
        figures = [t[key] * scale for key, scale in _SUMMED.items()]
        return ("total", "", "", "", *map(_number, (*figures, t["seconds_before"] * 1e3, t["seconds_after"] * 1e3)), "", "")


_SUMMED = {"flops_before": 1e-9, "flops_after": 1e-9, "bytes_before": 1e-6, "bytes_after": 1e-6, "kept_before": 1e-6, "kept_after": 1e-6}
"""What is summed over regions, and what it is multiplied by in tables."""
_FIGURES = ("GFLOP", "after", "MB", "after", "MB kept", "after", "ms dense", "sparse")
_ALIGN = ("left", "left", "left", *("right",) * (1 + len(_FIGURES)), "left", "left")


def _largest(rows: Sequence[RegionReport]) -> RegionReport:
    """The row of the largest sizes that a region was compiled for."""
    return max(rows, key=lambda r: r.flops_before or 0.0)


def _row(rows: Sequence[RegionReport]) -> tuple[str, ...]:
    """One region; with several rows, one for each size that it was compiled for, the figures are those of the largest."""
    r = _largest(rows)
    same = sum(row.status == r.status for row in rows)
    status = r.status if same == len(rows) else f"{r.status} in {same} of {len(rows)} graphs"
    scales = {"density": 1, **_SUMMED, "seconds_dense": 1e3, "seconds_sparse": 1e3}
    figures = ("" if (value := getattr(r, key)) is None else _number(value * scale) for key, scale in scales.items())
    why = f"[{r.rule}] {r.reason}" if r.rule else r.reason
    return (r.module or "(root)", r.kind, status, *figures, r.source, why)


def _number(value: float) -> str:
    """Three significant digits, without exponents in the range that tables hold."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _of_unit(unit: Unit) -> Report:
    order = {gm.graph: position for position, gm in enumerate(graphs(unit.gm))}
    decisions = unit.decisions
    if "rewrite" in (unit.config.disable or ()):
        decisions = tuple(replace(d, rewrite=False, reason=f"option 'disable' names pass 'rewrite'; {d.reason}") for d in decisions)
    rows = [(d.region.y, _decided(d)) for d in decisions] + [(r.node, _refused(r)) for r in unit.refusals]
    # A node keeps its sort key when it is erased from its graph.
    rows.sort(key=lambda row: (order.get(row[0].graph, 0), row[0]._sort_key))
    return Report(
        tuple(row for _, row in rows),
        tuple((record.name, record.seconds) for record in unit.records),
        tuple(_notes(unit)),
        1,
        tuple(_breaks(unit.gm)),
        (0,),
        unit.unmatched,
    )


def _breaks(gm: fx.GraphModule) -> Iterator[str]:
    """Where Dynamo broke the model behind a graph, and what it says of it."""
    why: Any = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return
    frame = why.user_stack[-1] if why.user_stack else None
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}: " if frame is not None else ""
    yield where + str(why.reason).strip().partition("\n")[0]


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
        kept_before=dense.kept,
        kept_after=after.kept,
        seconds_dense=dense.seconds,
        seconds_sparse=sparse.seconds,
    )


def _refused(refusal: Refusal) -> RegionReport:
    return RegionReport(refusal.kind, "refused", refusal.site.module, refusal.site.source, refusal.reason, refusal.rule)


def _computes(region: Region | LossRegion) -> str:
    if isinstance(region, LossRegion):
        return region.transform
    if not isinstance(region, AttentionRegion):
        return region.activation
    operands = [name for name, node in (("boolean mask", region.mask.boolean), ("bias", region.mask.bias)) if node is not None]
    scores = [f"scores {region.transform}"] if region.transform != "u0" else []
    scores += ["a sink"] if region.sink is not None else []
    return " and ".join([region.mask.predicate, *operands, *scores])


def _notes(unit: Unit) -> Iterator[str]:
    """What a user should know beyond the rows."""
    if unit.config.disable:
        yield f"option 'disable': without {', '.join(unit.config.disable)}"
    rewritten = [d.region for d in unit.decisions if d.rewrite]
    bare = [r for r in rewritten if not isinstance(r, LossRegion) and r not in unit.states]
    attention = sum(r.kind == "attention" for r in bare)
    ffn = sum(isinstance(d.settings, FfnSettings) and d.region not in unit.states for d in unit.decisions if d.rewrite)
    if attention and unit.config.attention_selector == "pq":
        yield f"{_regions(attention, 'attention')} by pooled queries; sptc.prepare(model, ...) would add codebooks (selector 'pq')"
    if ffn:
        yield f"{_regions(ffn, 'FFN')} by the means of weights; sptc.prepare(model, ...) would add routers that train"
    yield from _own_blocks_unknown([d for d in unit.decisions if d.rewrite])
    if unit.config.ffn_keep is not None and "ffn.keep" in unit.config.given:
        yield from _routed_alike(unit)
    for region, state in unit.states.items():
        if isinstance(state, RouterState) and state.training and not state.trainable:
            yield f"the router of {region.site.module or 'the model'} is frozen: it chooses but does not learn"


def _own_blocks_unknown(rewritten: Sequence[Decision]) -> Iterator[str]:
    """What is lost where a mask stays a tensor: whether it is causal can't be told from it, and so which keys are a tile's own."""
    lost = [d.region for d in rewritten if isinstance(d.region, AttentionRegion) and d.settings.density < 1 and _may_be_causal(d.region)]
    if lost:
        names = ", ".join(dict.fromkeys(r.site.module or "(root)" for r in lost[:2])) + (", ..." if len(lost) > 2 else "")
        yield (
            f"the mask of {len(lost)} attention region{'s' * (len(lost) != 1)} ({names}) could not be read and stays a tensor: "
            "if it is causal, that is not known, and a query's own keys are not kept before others"
        )


def _may_be_causal(region: AttentionRegion) -> bool:
    """Whether a region of as many queries as keys has a mask of which no more is known than its tensor."""
    unread = region.mask.boolean is not None or region.mask.bias is not None
    return unread and not region.mask.causal and same_size(shape(region.q)[-2], shape(region.k)[-2])


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
