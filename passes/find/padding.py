"""Which tokens of a batch are padding, those that attention hides as keys whatever looks at them, and what has its tokens in that order."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from sptc.ir.predicate import Binary, Element, Index, Literal, parse
from sptc.ir.region import AttentionRegion, FfnRegion, Region
from sptc.passes.graph.effects import written_values
from sptc.passes.graph.frame import Frame, frames, input_index, operands, outermost
from sptc.passes.graph.pattern import argument, base_name, dtype, op, same_size, shape
from sptc.passes.graph.row_axes import Axes, axes_after, rows_of
from sptc.passes.unit import Unit

# Attention that is no region: what stands first is of the queries' tokens.
OF_PAIRS = frozenset(
    {"aten.scaled_dot_product_attention.default", "aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default", "aten.einsum.default"}
)


# What is looked up in a table, and the position of the operand by which it is: as many rows as that has.
_LOOKUPS = {"aten.embedding.default": 1, "aten.gather.default": 2}


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


def in_its_order(unit: Unit, padding: Node) -> frozenset[FfnRegion]:
    """The FFNs whose rows are the tokens of the padding mask, [batch, tokens], in its order.

    Sizes do not tell: [tokens, batch, d] is flattened to as many rows, or is a square, and a batch may be sorted, or turned around.
    """
    order = _Order(unit, padding)
    order.follow(order.outermost)
    return order.ffns()


class _Order:
    """Which dimensions of a value are the mask's batch and tokens, followed from what tokens are embedded by.

    Whatever mixes tokens, and yet gives each of them its own row, keeps them in order here, as attention does.

    Attributes:
        axes: without an entry a value does not depend on tokens; None where their order is not known.
    """

    def __init__(self, unit: Unit, padding: Node) -> None:
        self.axes: dict[Node, Axes | None] = {}
        self._indices: dict[Node, Axes | _Nothing | None] = {}
        every = list(frames(unit.gm))
        self.outermost = every[0]
        self._lead = shape(padding)
        self._by_call = {frame.call: frame for frame in every if frame.call is not None}
        self._regions = unit.regions
        self._inside = {node: region for region in unit.regions for node in region.nodes}
        by_graph = {frame.gm.graph: frame for frame in every}
        attentions = (region for region in unit.regions if isinstance(region, AttentionRegion))
        self._hiding = [region for region in attentions if hiding(region, by_graph) is padding]

    def ffns(self) -> frozenset[FfnRegion]:
        """None at all unless keys that the mask hides are seen to be its tokens: inputs that are taken for its tokens might be others."""
        keys = [
            self.axes.get(region.k) == rows_of(shape(region.k), (0, 2)) for region in self._hiding if self.axes.get(region.k) is not None
        ]
        if not keys or not all(keys):
            return frozenset()
        return frozenset(region for region in self._regions if isinstance(region, FfnRegion) and self._lies(region.x))

    def _lies(self, x: Node) -> bool:
        """Whether a value [..., d] has the tokens in its dimensions but the last, in order."""
        return self.axes.get(x) == rows_of(shape(x), range(len(shape(x)) - 1))

    def follow(self, frame: Frame) -> None:
        for node in frame.gm.graph.nodes:
            region = self._inside.get(node)
            if region is not None:
                if node is region.y:
                    self._set(node, self._after_region(region))
            elif node in self._by_call:
                body = self._by_call[node]
                self.axes.update({inner: self.axes[outer] for inner, outer in operands(body).items() if outer in self.axes})
                self.follow(body)
            elif node.op == "placeholder":
                if frame is self.outermost and self._embedded(node):
                    self.axes[node] = rows_of(shape(node), range(len(self._lead)))
            elif node.op == "call_function":
                self._set(node, self._after(node))

    def _embedded(self, node: Node) -> bool:
        """Whether an input is features of the mask's tokens, [batch, tokens, d]."""
        kind, sizes = dtype(node), shape(node)
        return kind is not None and kind.is_floating_point and len(sizes) == len(self._lead) + 1 and self._is_lead(sizes[:-1])

    def _is_lead(self, sizes: Sequence[Any]) -> bool:
        return len(sizes) == len(self._lead) and all(same_size(a, b) for a, b in zip(sizes, self._lead, strict=True))

    def _set(self, node: Node, axes: Axes | _Nothing | None) -> None:
        if not isinstance(axes, _Nothing):
            self.axes[node] = axes

    def _after_region(self, region: Region) -> Axes | _Nothing | None:
        source = region.q if isinstance(region, AttentionRegion) else region.x
        if source not in self.axes:
            return _NOTHING
        if isinstance(region, AttentionRegion):
            return rows_of(shape(region.y), (0, 2)) if self.axes[source] == rows_of(shape(source), (0, 2)) else None
        return rows_of(shape(region.y), range(len(shape(region.y)) - 1)) if self._lies(source) else None

    def _after(self, node: Node) -> Axes | _Nothing | None:
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and source in self._by_call:
            (output,) = self._by_call[source].gm.graph.find_nodes(op="output")
            returned = output.args[0][int(node.args[1])]  # type: ignore[index, call-overload]
            return self.axes.get(returned, _NOTHING)
        if op(node) == "aten.embedding.default":
            return self._of_indices(node)
        known = {operand: self.axes[operand] for operand in node.all_input_nodes if operand in self.axes}
        if not known:
            return _NOTHING
        if base_name(node) in OF_PAIRS and isinstance(source, Node):  # attention that is no region
            rows = known.get(source)
            return rows if rows is not None and len(shape(node)) == len(shape(source)) and len(shape(source)) - 1 not in rows else None
        if any(rows is None for rows in known.values()):
            return None
        return axes_after(node, known)  # type: ignore[arg-type]

    def _of_indices(self, node: Any) -> Axes | _Nothing | None:
        """Of embeddings and what they are looked up by: an input of the mask's sizes, or what is computed of one, as positions are."""
        if not isinstance(node, Node):
            return _NOTHING
        if node not in self._indices:
            self._indices[node] = self._of_index(node)
        return self._indices[node]

    def _of_index(self, node: Node) -> Axes | _Nothing | None:
        if node.op == "placeholder":
            return rows_of(shape(node), range(len(self._lead))) if self._is_lead(shape(node)) else _NOTHING
        known = {operand: rows for operand in node.all_input_nodes if not isinstance(rows := self._of_indices(operand), _Nothing)}
        if not known:
            return _NOTHING
        if any(rows is None for rows in known.values()):
            return None
        if op(node) == "aten.cumsum.default":
            return known[node.args[0]]  # type: ignore[index]
        if op(node) in _LOOKUPS:
            return known.get(node.args[_LOOKUPS[op(node)]]) if len(known) == 1 else None  # type: ignore[call-overload]
        return axes_after(node, known)  # type: ignore[arg-type]


class _Nothing:
    """Of a value that does not depend on tokens."""


_NOTHING = _Nothing()
