"""What the log says of a compile, once a model: how many of its regions are sparse, and a warning where little or nothing is.

A backend is given one graph at a time and never hears that a model has no more. So graphs in which training runs are gathered, and the
second step tells that the first one is over: a graph is called again with the same weights, or its code is compiled once more for them,
for other sizes. By then each graph of forward was compiled, and backward too. A model that takes a single step says nothing; `sptc.report`
does not wait.
"""

from __future__ import annotations

import logging
import os
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._guards import CompileContext, TracingContext
from torch._subclasses.fake_tensor import FakeTensor

from sptc.config import Config
from sptc.reports.ranks import is_first_rank
from sptc.reports.report import RegionReport, Report

log = logging.getLogger(__name__)

_MANY = 4  # graphs: a break before the loss makes two, which is not worth a warning
_PLACES = 3  # breaks that it names
_MORE = 'print(sptc.report(model)) or TORCH_LOGS="+sptc" shows more'

_Weight = Callable[[], nn.Parameter | None]


@dataclass(frozen=True, eq=False)  # one is itself alone: references to weights compare by what they refer to
class _Graph:
    """A graph of a first step."""

    key: tuple[Any, ...]  # equal for graphs of the same code with the same options and weights of the same shapes
    compile: str  # graphs that Dynamo made of one frame at once have it in common
    weight: _Weight  # the first of its parameters: layers of one kind share a graph, and are told apart by it
    report: Report


class Summary:
    """Gathers graphs and says at the second step what became of them."""

    def __init__(self) -> None:
        self._waiting: list[_Graph] = []
        self._known: dict[tuple[Any, ...], str] = {}  # what is waiting or was said, and when it was compiled

    def gather(self, report: Report, config: Config, example_inputs: Sequence[Any]) -> Callable[[Sequence[Any]], bool] | None:
        """Take in a graph as it is compiled.

        Returns what is to be called with the arguments of each of its calls until it returns True; None: there is no need.
        """
        trains = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
        if not trains and not any(r.status == "rewritten" for r in report.regions):
            return None  # evaluation, a frozen reference: dense by default
        shapes = Counter((tuple(x.shape), x.dtype) for x in example_inputs if isinstance(x, nn.Parameter))
        key = (_place(traced_code()), str(config.to_options()), frozenset(shapes.items()))
        graph = _Graph(key, str(CompileContext.current_compile_id()), _first_weight(example_inputs), report)
        if self._known.setdefault(key, graph.compile) != graph.compile:
            if any(other.key == key and other.weight() is graph.weight() for other in self._waiting):
                self._say()
            return None
        self._waiting.append(graph)
        first: list[_Weight] = []  # call's

        def called(args: Sequence[Any]) -> bool:
            if any(isinstance(x, FakeTensor) for x in args):
                return False  # where DDP splits a graph it runs the parts once as it compiles them
            weight = _first_weight(args)
            if first and first[0]() is weight() and graph in self._waiting:
                self._say()
            first.append(weight)
            return graph not in self._waiting

        return called

    def forget(self) -> None:
        """Say again what was said."""
        self._waiting, self._known = [], {}

    def _say(self) -> None:
        graphs, self._waiting = self._waiting, []
        if not is_first_rank():
            return
        merged = Report.merged(graph.report for graph in graphs)
        name = graphs[0].key[0]
        level = logging.INFO if any(r.status == "rewritten" for r in merged.regions) else logging.WARNING
        log.log(level, "%s: %s", name, summary(merged))
        if merged.graphs > _MANY:
            log.warning("%s: %s", name, "; ".join(_many(merged)))


def traced_code() -> types.CodeType | None:
    """The code object that Dynamo compiles now: of the frame itself, not of what it inlines."""
    codes = TracingContext.get_traced_code()
    return codes[0] if codes else None


def summary(report: Report) -> str:
    """One line: how many regions of how many are rewritten, what the cost model gains by them, and why most of the others are not."""
    rows = [r for r in report.regions if r.kind != "graph"]  # that is a refusal to look into an operator, and no region
    dense = _most_often_dense(report.regions)
    if not rows:
        why = f" ({dense})" if dense else ""
        return f"no attention, FFN or loss was found in {report.graphs} graph{'s' * (report.graphs != 1)}{why}: all is dense; {_MORE}"
    done = [r for r in rows if r.status == "rewritten"]
    kinds = Counter(r.kind for r in rows)
    parts = ", ".join(f"{kind} {sum(r.kind == kind for r in done)} of {count}" for kind, count in kinds.items())
    if not done:
        return f"none of {len(rows)} regions is rewritten ({parts}): {dense}; {_MORE}"
    totals = report.totals()
    gain = f"predicted: {totals['seconds_after']:.3g} s of each step, {totals['seconds_before']:.3g} s dense"
    return f"{len(done)} of {len(rows)} regions are rewritten ({parts}); {gain}{'; dense: ' * bool(dense)}{dense}"


def _most_often_dense(rows: Sequence[RegionReport]) -> str:
    """Why regions are dense, the most frequent reason alone; reasons are equal up to their figures, which follow a colon. "" if none is."""
    alike: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r.status != "rewritten":
            reason = f"[{r.rule}] {r.reason}" if r.rule else r.reason
            alike.setdefault((r.kind, r.rule or r.reason.partition(":")[0]), []).append(reason)
    if not alike:
        return ""
    (kind, _), reasons = max(alike.items(), key=lambda item: len(item[1]))
    return f"{len(reasons)} x {kind}, {reasons[0]}"


def _many(report: Report) -> Iterator[str]:
    yield f"{report.graphs} graphs: little of the step is in one, and no region reaches from one into another"
    if report.breaks:
        more = f" and {len(report.breaks) - _PLACES} more" if len(report.breaks) > _PLACES else ""
        yield f"broken at {', '.join(report.breaks[:_PLACES])}{more}"
    yield 'sptc.report(model) lists them, TORCH_LOGS="graph_breaks" explains them'


def _first_weight(inputs: Sequence[Any]) -> _Weight:
    """The first parameter, held weakly; None where there is none, or only fakes (those that DDP's splits are compiled with)."""
    real = (x for x in inputs if isinstance(x, nn.Parameter) and not isinstance(x, FakeTensor))
    weight = next(real, None)
    return _nothing if weight is None else weakref.ref(weight)


def _nothing() -> None:
    return None


def _place(code: types.CodeType | None) -> str:
    return "the model" if code is None else f"{code.co_qualname} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
