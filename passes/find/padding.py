"""Which tokens of a batch are padding: those that attention hides as keys, whatever looks at them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from sptc.ir.predicate import Binary, Element, Index, Literal, parse
from sptc.ir.region import AttentionRegion
from sptc.passes.graph.frame import Frame, frames, input_index, outermost
from sptc.passes.graph.pattern import shape
from sptc.passes.unit import Unit


def padding_mask(unit: Unit) -> Node | None:
    """The input [batch, tokens] that is 0 at padding: the one by which attention hides keys whatever looks at them."""
    by_graph = {frame.gm.graph: frame for frame in frames(unit.gm)}
    found = (hiding(r, by_graph) for r in unit.regions if isinstance(r, AttentionRegion))
    return next((node for node in found if node is not None and node.graph is unit.gm.graph), None)


def visible_share(unit: Unit) -> float | None:
    """The share of the example batch's tokens that are no padding; None where there is no mask of them, or its values are not at hand."""
    mask = padding_mask(unit)
    index = None if mask is None else input_index(mask)
    values = None if index is None else unit.example_inputs[index]
    if not isinstance(values, torch.Tensor) or isinstance(values, FakeTensor):
        return None
    return float((values != 0).double().mean())


def hiding(region: AttentionRegion, by_graph: Mapping[Graph, Frame]) -> Node | None:
    """The input [batch, keys] of the outermost graph by which attention hides the keys where it is 0, whatever looks at them."""
    for conjunct in parse(region.mask.predicate).conjuncts:
        tree = conjunct.tree
        if isinstance(tree, Binary) and tree.operator == "!=" and tree.right == Literal(0):
            tree = tree.left
        if isinstance(tree, Element) and tree.indices == (Index("b"), Index("k")):
            node = region.mask.tensors[tree.position]
            node = outermost(node, by_graph[node.graph])
            if node.op == "placeholder" and len(shape(node)) == 2:
                return node
    return None
