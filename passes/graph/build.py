"""Write nodes into a graph with their fake values, so that later passes and dumps see shapes and mistakes show at once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.fx.node import map_aggregate

from sptc.passes.graph.modes import autocast_like
from sptc.passes.graph.pattern import dtype, value

aten = torch.ops.aten


class Builder:
    """Inserts nodes before `anchor`; what they stand for in the user's model is the place of `like`, by default the anchor's."""

    def __init__(self, anchor: Node, like: Node | None = None) -> None:
        self._anchor = anchor
        self._like = like or anchor
        self._fake_mode = detect_fake_mode([value(self._like)])

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        graph = self._anchor.graph
        with graph.inserting_before(self._anchor):
            node = graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in self._like.meta:
                node.meta[key] = self._like.meta[key]
        values = map_aggregate(args, value)  # type: ignore[arg-type]
        options = map_aggregate(kwargs, value)  # type: ignore[arg-type]
        assert self._fake_mode is not None
        # Some kernels of ATen ask for sizes as numbers, which would guard on them; their Python forms, which tracing takes, do not.
        with self._fake_mode, enable_python_dispatcher(), torch.no_grad(), autocast_like(node, value(self._like).device.type):
            node.meta["val"] = target(*values, **options)  # type: ignore[misc]
        # A size that only data will tell is this node's to define, as if it had been traced.
        if bindings := compute_unbacked_bindings(self._fake_mode.shape_env, node.meta["val"]):
            node.meta["unbacked_bindings"] = bindings
        return node

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def cast(self, node: Node, to: torch.dtype | None) -> Node:
        return node if to is None or dtype(node) == to else self.call(aten.to.dtype, node, to)

    def seed(self) -> Node:
        """A fresh seed for dropout, drawn in this graph so that recomputation in a checkpoint draws the same one."""
        device = value(self._anchor).device
        return self.call(aten.randint.low, 0, 2**63 - 1, [1], dtype=torch.int64, device=device)
