"""Which tokens of a batch are padding: those that attention hides as keys, whatever looks at them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from sptc.ir.predicate import Binary, Element, Index, Literal, parse
from sptc.ir.region import AttentionRegion
from sptc.passes.graph.effects import written_values
from sptc.passes.graph.frame import Frame, frames, input_index, outermost
from sptc.passes.graph.pattern import argument, dtype, op, same_size, shape
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
    if not isinstance(values, torch.Tensor) or isinstance(values, FakeTensor) or not values.numel():
        return None
    real = values != 0
    return float((real | ~real[:, :1] if averages_padding(unit) else real).double().mean())


def averages(region: AttentionRegion) -> bool:
    """Whether a query that sees no key may get an average over all of them, hidden ones included: what a finite constant in a mask does.

    The operator, given a boolean mask, returns zeros for it.
    """
    mask = argument(region.y, 3, "attn_mask") if op(region.y) == "aten.scaled_dot_product_attention.default" else None
    return not isinstance(mask, Node) or dtype(mask) != torch.bool


def may_average(region: AttentionRegion) -> bool:
    """Whether operands could hide every key of some query, which then averages over them: sparse attention gives zeros there.

    With a sink nothing is averaged: it has all of such a row's softmax.
    """
    return not region.mask.seeing and region.sink is None and averages(region)


def averages_padding(unit: Unit) -> bool:
    """Whether some attention that hides padding averages over all keys for a query that sees none."""
    by_graph = {frame.gm.graph: frame for frame in frames(unit.gm)}
    padding = padding_mask(unit)
    return any(hiding(r, by_graph) is padding and averages(r) for r in unit.regions if isinstance(r, AttentionRegion))


def first_is_seen(region: AttentionRegion) -> bool:
    """Whether every query may see the first key, unless it is padding: keys are hidden as padding or by causality, and by nothing else."""
    mask = region.mask
    ahead = mask.causal and same_size(shape(region.q)[-2], shape(region.k)[-2])
    return mask.boolean is None and mask.bias is None and len(parse(mask.predicate).conjuncts) == 1 + ahead


def hiding(region: AttentionRegion, by_graph: Mapping[Graph, Frame]) -> Node | None:
    """The input [batch, keys] of the outermost graph by which attention hides the keys where it is 0, whatever looks at them.

    None where the graph writes to it, be it before, between or behind its attentions: tokens that it hides here it may show there.
    """
    for conjunct in parse(region.mask.predicate).conjuncts:
        tree = conjunct.tree
        if isinstance(tree, Binary) and tree.operator == "!=" and tree.right == Literal(0):
            tree = tree.left
        if isinstance(tree, Element) and tree.indices == (Index("b"), Index("k")):
            node = region.mask.tensors[tree.position]
            node = outermost(node, by_graph[node.graph])
            if node.op == "placeholder" and len(shape(node)) == 2 and node not in written_values(node.graph):
                return node
    return None
