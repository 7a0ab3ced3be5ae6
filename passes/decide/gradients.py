"""Where a graph records gradients: the regions that training runs through, and not those of an evaluation or a frozen reference."""

from __future__ import annotations

import torch
from torch.fx import Node

from sptc.ir.region import LossRegion, Region
from sptc.passes.graph.frame import frames
from sptc.passes.graph.pattern import requires_grad
from sptc.passes.unit import Unit


def with_gradients(unit: Unit) -> frozenset[Region | LossRegion]:
    """The regions that stand where gradients are recorded, in a graph in which something requires one.

    What a region computes may need none itself: below the first adapter it is frozen, and yet part of training.
    """
    every = list(frames(unit.gm))
    if not any(requires_grad(node) for frame in every for node in frame.gm.graph.nodes):
        return frozenset()
    recorded: set[Node] = set()
    for frame in every:  # outermost first: a body starts as the call that runs it
        on = torch.is_grad_enabled() if frame.call is None else frame.call in recorded
        for node in frame.gm.graph.nodes:
            if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
                on = bool(node.args[0])
            elif on:
                recorded.add(node)
    return frozenset(region for region in (*unit.regions, *unit.losses) if region.y in recorded)
