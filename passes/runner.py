"""Runs passes: timing, lint, recompile, dead code and counts belong here, so that a pass is only what it does to the graph."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from sptc.passes.graph.frame import graphs
from sptc.passes.normalize.lower import lower
from sptc.passes.unit import PassRecord, Unit

log = logging.getLogger(__name__)

Pass = Callable[[Unit], Unit]
Observer = Callable[[str, Unit], None]


def run(unit: Unit, pipeline: Sequence[tuple[Pass, str]], observe: Observer | None = None) -> Unit:
    """Run (pass, why) pairs in order, but for those that option "disable" names. Without `lower` there is no graph that others can read.

    Args:
        unit: the captured graph.
        pipeline: PIPELINE of sptc.passes, or a prefix of it.
        observe: called with the pass's name and its result after every pass (a dump, a test).
    """
    for apply, _ in pipeline:
        if unit.closed is not None:
            break
        if apply.__name__ in (unit.config.disable or ()):
            log.debug("%s: disabled", apply.__name__)
            if apply is lower:
                break
            continue
        before, start = _operators(unit), time.perf_counter()
        unit = apply(unit)
        if unit.closed is None:
            for gm in graphs(unit.gm):
                gm.graph.lint()
                gm.recompile()
        record = PassRecord(apply.__name__, time.perf_counter() - start)
        unit = replace(unit, records=(*unit.records, record))
        log.debug("%s: %.0f ms, %s", record.name, record.seconds * 1e3, ", ".join(_changes(before, _operators(unit))) or "graph as it was")
        if observe is not None:
            observe(apply.__name__, unit)
    return unit


def _operators(unit: Unit) -> Counter[str]:
    """How many nodes call what. Empty where no one will see it."""
    if not log.isEnabledFor(logging.DEBUG):
        return Counter()
    return Counter(_name(node) for gm in graphs(unit.gm) for node in gm.graph.nodes if node.op.startswith("call_"))


def _name(node: Node) -> str:
    """Of an operator such as "aten.linear", whichever overload; of what Dynamo captures the name of the function or method."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    return str(getattr(node.target, "__name__", node.target))


def _changes(before: Counter[str], after: Counter[str]) -> Iterator[str]:
    """For every operator of which there are more or fewer now "aten.linear 48 -> 36", in the order of names."""
    for name in sorted(before.keys() | after.keys()):
        if before[name] != after[name]:
            yield f"{name} {before[name]} -> {after[name]}"
