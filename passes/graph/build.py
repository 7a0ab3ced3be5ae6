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
from torch.utils.checkpoint import CheckpointPolicy

from sptc.passes.graph.modes import autocast_like
from sptc.passes.graph.pattern import dtype, shape, value

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

    def recomputed(self, node: Node) -> Node:
        """The node, to be computed again in backward and not kept until then. Not for random numbers."""
        # The partitioner wants to know which checkpoint a mark is of; those of checkpoints count from 1.
        node.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=0)
        return node

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def size(self, node: Node, dim: int) -> Node | int:
        """The size of a dimension: a number when static, else a node that computes it."""
        known = shape(node)[dim]
        return known if isinstance(known, int) else self.call(aten.sym_size.int, node, dim)

    def cast(self, node: Node, to: torch.dtype | None) -> Node:
        return node if to is None or dtype(node) == to else self.call(aten.to.dtype, node, to)

    def single(self, node: Node) -> Node:
        """In fp32 whatever autocast makes of `node`."""
        return self.call(aten.to.dtype, node, torch.float32)

    def rows(self, node: Node) -> Node:
        """[..., d] as [N, d]."""
        return node if len(shape(node)) == 2 else self.call(aten.reshape.default, node, [-1, shape(node)[-1]])

    def like_rows_of(self, node: Node, x: Node, y: Node) -> Node:
        """[N, d] with the leading dimensions of `y`, which are those of `x` or are flat already."""
        lead = shape(y)[:-1]
        if len(lead) == 1:
            return node
        if len(shape(x)) == len(shape(y)):
            sizes: list[Any] = [self.size(x, i) for i in range(len(lead))]
        else:
            sizes = [s if isinstance(s, int) else self._known(s) for s in lead]
        return self.call(aten.reshape.default, node, [*sizes, shape(node)[-1]])

    def _known(self, size: torch.SymInt) -> Node | int:
        """A node before the anchor that computes a symbolic size; -1, once, for a size that only the anchor has."""
        for node in self._anchor.graph.nodes:
            if node is self._anchor:
                return -1
            if isinstance(value(node), torch.SymInt) and value(node).node.expr == size.node.expr:
                return node
        return -1

    def seed(self) -> Node:
        """A fresh seed for dropout, drawn in this graph so that recomputation in a checkpoint draws the same one."""
        device = value(self._anchor).device
        return self.call(aten.randint.low, 0, 2**63 - 1, [1], dtype=torch.int64, device=device)
