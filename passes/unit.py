"""What flows through the pipeline: one graph and all that the passes have learned of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sptc.config import Config
from sptc.ir.plan import Plan
from sptc.ir.region import Counted, Decision, Deferral, LossRegion, Refusal, Region, Rows, State


@dataclass(frozen=True)
class PassRecord:
    """One pass as it ran: its name and seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Unit:
    """One captured graph on its way through the passes. Each pass returns a new Unit; only normalize, bind and rewrite touch the graph."""

    gm: fx.GraphModule
    example_inputs: tuple[Any, ...]
    config: Config
    device: Any = None  # DeviceCosts of sptc/device/costs.py: what `decide` knows of the device
    plan: Plan | None = None  # densities of single regions
    regions: tuple[Region, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    unmatched: tuple[str, ...] = ()  # patterns of option `exclude` that name no region
    losses: tuple[LossRegion, ...] = ()  # exact whatever the options: neither plans nor states know them
    dropped: tuple[int, ...] = ()  # results of the rewritten graph that are None where the captured one returns logits
    deferred: Mapping[int, Deferral] = field(default_factory=dict)  # in place of these results it returns what they are computed from
    handles: tuple[tuple[int, int], ...] = ()  # results of the rewritten graph without gradient, and which results are their handles
    states: Mapping[Region, State] = field(default_factory=dict)  # regions of a prepared model
    counted: Counted | str | None = None  # which tokens count in the loss, or why that is not known; None: without a loss, or not asked
    counted_share: float | None = None  # of the example batch's tokens, where it can be computed
    visible_share: float | None = None  # of the example batch's tokens: those that attention does not hide as padding
    read: Mapping[Region, Rows] = field(default_factory=dict)  # of FFNs: the tokens whose output anything reads
    lean: frozenset[Region] = frozenset()  # what the plan wants to keep less for backward, exact
    decisions: tuple[Decision, ...] = ()
    closed: Refusal | None = None  # why the graph can't be looked into: it stays as Dynamo captured it
    records: tuple[PassRecord, ...] = ()
