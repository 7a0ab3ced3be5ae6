"""Runs passes: timing, lint, recompile, dead code and counts belong here, so that a pass is only what it does to the graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from sptc.passes.graph.frame import graphs
from sptc.passes.unit import PassRecord, Unit

Pass = Callable[[Unit], Unit]
Observer = Callable[[str, Unit], None]


def run(unit: Unit, pipeline: Sequence[tuple[Pass, str]], observe: Observer | None = None) -> Unit:
    """Run (pass, why) pairs in order.

    Args:
        unit: the captured graph.
        pipeline: PIPELINE of sptc.passes, or a prefix of it.
        observe: called with the pass's name and its result after every pass (a dump, a test).
    """
    for apply, _ in pipeline:
        if unit.closed is not None:
            break
        before = _size(unit)
        start = time.perf_counter()
        unit = apply(unit)
        if unit.closed is None:
            for gm in graphs(unit.gm):
                gm.graph.lint()
                gm.recompile()
        record = PassRecord(apply.__name__, time.perf_counter() - start, before, _size(unit))
        unit = replace(unit, records=(*unit.records, record))
        if observe is not None:
            observe(apply.__name__, unit)
    return unit


def _size(unit: Unit) -> int:
    return sum(len(gm.graph.nodes) for gm in graphs(unit.gm))
