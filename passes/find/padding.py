"""Which tokens of a batch are padding, those that attention hides as keys whatever looks at them, and what has its tokens in that order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from sptc.ir.predicate import Binary, Element, Index, Literal, parse
from sptc.ir.region import AttentionRegion, FfnRegion, Region
from sptc.passes.graph.effects import written_values
from sptc.passes.graph.frame import Frame, frames, input_index, outermost
from sptc.passes.graph.pattern import COPIES, argument, base_name, dtype, op, same_size, shape
from sptc.passes.graph.row_axes import Axes, Follower, axes_after, rows_of
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
    order.follow(order.frames[0])
    return order.ffns()


class _Order(Follower):
    """Which dimensions of a value are the mask's batch and tokens, followed from what tokens are embedded by.

    Whatever mixes tokens, and yet gives each of them its own row, keeps them in order here, as attention does.

    Attributes:
        axes: without an entry nothing is known of a value that depends on its order; None where its tokens are in no known order.
        indices: the same of what embeddings are looked up by: an input of the mask's sizes, or what is computed of one, as positions are.
    """

    def __init__(self, unit: Unit, padding: Node) -> None:
        super().__init__(unit.gm, unit.regions)
        # Rows may be written in another order, through a view as well.
        self._written = {node for frame in self.frames for node in written_values(frame.gm.graph)}
        self.indices: dict[Node, Axes | None] = {}
        self._regions = unit.regions
        attentions = (region for region in unit.regions if isinstance(region, AttentionRegion))
        self._hiding = [region for region in attentions if hiding(region, self._by_graph) is padding]
        lead = shape(padding)
        for node in unit.gm.graph.find_nodes(op="placeholder"):
            kind, sizes = dtype(node), shape(node)
            if kind is None or kind.is_complex or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):  # a parameter
                continue
            if len(sizes) != len(lead) + kind.is_floating_point:  # [batch, tokens], and features of them
                continue
            if all(same_size(a, b) for a, b in zip(sizes, lead, strict=False)):
                self._set(self.axes if kind.is_floating_point else self.indices, node, rows_of(sizes, range(len(lead))))

    def ffns(self) -> frozenset[FfnRegion]:
        """None at all unless keys that the mask hides are seen to be its tokens: inputs that are taken for its tokens might be others."""
        keys = [region.k for region in self._hiding if self.axes.get(region.k) is not None]
        if not keys or any(self.axes[k] != rows_of(shape(k), (0, 2)) for k in keys):
            return frozenset()
        return frozenset(region for region in self._regions if isinstance(region, FfnRegion) and self._lies(region.x))

    def _lies(self, x: Node) -> bool:
        """Whether a value [..., d] has the tokens in its dimensions but the last, in order."""
        return self.axes.get(x) == rows_of(shape(x), range(len(shape(x)) - 1))

    def _follow_region(self, region: Region) -> None:
        source, sizes = region.q if isinstance(region, AttentionRegion) else region.x, shape(region.y)
        if source not in self.axes:
            return
        if isinstance(region, AttentionRegion):
            lies, after = self.axes[source] == rows_of(shape(source), (0, 2)), rows_of(sizes, (0, 2))
        else:
            lies, after = self._lies(source), rows_of(sizes, range(len(sizes) - 1))
        self._set(self.axes, region.y, after if lies else None)

    def _set(self, found: dict[Node, Axes | None], node: Node, axes: Axes | None) -> None:
        found[node] = None if node in self._written else axes

    def _follow_call(self, node: Node) -> None:
        name = op(node)
        read = node.args[:1] if name in COPIES else node.all_input_nodes
        known = {n: self.axes[n] for n in read if n in self.axes}
        indices = {n: self.indices[n] for n in read if n in self.indices}
        if name in _LOOKUPS and indices and not known:
            found = indices.get(node.args[_LOOKUPS[name]]) if len(indices) == 1 else None  # type: ignore[call-overload]
            self._set(self.axes if name == "aten.embedding.default" else self.indices, node, found)
        elif known:
            self._set(self.axes, node, _of_queries(node, known) if base_name(node) in OF_PAIRS else _after(node, known))
        elif indices:
            cumulated = name == "aten.cumsum.default"
            self._set(self.indices, node, indices.get(node.args[0]) if cumulated else _after(node, indices))  # type: ignore[call-overload]


def _of_queries(node: Node, known: Mapping[Node, Axes | None]) -> Axes | None:
    """Of attention that is no region."""
    first: Any = node.args[1 if base_name(node) == "aten.baddbmm.default" else 0]
    rows = known.get(first) if isinstance(first, Node) else None
    return rows if rows is not None and len(shape(node)) == len(shape(first)) and len(shape(first)) - 1 not in rows else None


def _after(node: Node, known: Mapping[Node, Axes | None]) -> Axes | None:
    rows = {n: axes for n, axes in known.items() if axes is not None}
    return axes_after(node, rows) if len(rows) == len(known) else None
