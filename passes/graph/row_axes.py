"""Which dimensions of a value are its tokens: followed from a value whose tokens are known through what treats every token alike.

A value's rows are the product of some of its dimensions, in an order: [batch, length, features] has rows (0, 1), flattened (0,), split into
heads and transposed (0, 2). Dimensions of size 1 make no difference and are left out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sptc.ir.hint import optimization_hint
from sptc.ir.region import LossRegion, Region
from sptc.passes.graph.elementwise import pointwise
from sptc.passes.graph.frame import Frame, frames, operands
from sptc.passes.graph.pattern import COPIES, VIEWS, argument, op, same_size, shape
from sptc.passes.graph.rows import order_of

Axes = tuple[int, ...]

_PRODUCTS = {"aten.linear.default": 0, "aten.matmul.default": 0, "aten.mm.default": 0, "aten.addmm.default": 1}
"""The position of the operand whose last dimension is multiplied with a matrix."""
_ALONG = frozenset({"aten.softmax.int", "aten.log_softmax.int", "aten._softmax.default", "aten._log_softmax.default"})
_REDUCTIONS = frozenset({"aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default", "aten.var.correction"})
_NORMS = frozenset({"aten.layer_norm.default", "aten.rms_norm.default"})
_PARTS = frozenset({"aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes"})


class Follower:
    """Follows rows forwards through a graph and its checkpoint bodies; whoever derives from it says what they are behind a node.

    Attributes:
        axes: which dimensions of a value are the rows; without an entry it has nothing to do with them, None where they are not known.
    """

    def __init__(self, gm: GraphModule, regions: Iterable[Region | LossRegion]) -> None:
        self.axes: dict[Node, Axes | None] = {}
        self.frames = list(frames(gm))
        self._by_call = {frame.call: frame for frame in self.frames if frame.call is not None}
        self._by_graph = {frame.gm.graph: frame for frame in self.frames}
        self._inside = {node: region for region in regions for node in region.nodes}

    def follow(self, frame: Frame) -> None:
        """Find the rows of every value of a graph, given those of its inputs."""
        for node in frame.gm.graph.nodes:
            region = self._inside.get(node)
            if region is not None and not isinstance(region, LossRegion):
                if node is region.y:
                    self._follow_region(region)
            elif node in self._by_call:
                body = self._by_call[node]
                self.axes.update({inner: self.axes[outer] for inner, outer in operands(body).items() if outer in self.axes})
                self.follow(body)
            elif (result := self._result_of(node)) is not None:
                if result in self.axes:
                    self.axes[node] = self.axes[result]
            elif node.op == "call_function":
                self._follow_call(node)

    def _result_of(self, node: Node) -> Node | None:
        """The node of a checkpoint body that a node around it is the result of."""
        source = node.args[0] if node.args and node.target is operator.getitem else None
        return self._returned(self._by_call[source])[int(node.args[1])] if source in self._by_call else None  # type: ignore[index, call-overload]

    def _returned(self, frame: Frame) -> list[Any]:
        """What a body returns, one after another."""
        (output,) = frame.gm.graph.find_nodes(op="output")
        returned: Any = output.args[0]
        return list(returned) if isinstance(returned, list | tuple) else [returned]

    def _follow_region(self, region: Region) -> None:
        raise NotImplementedError

    def _follow_call(self, node: Node) -> None:
        raise NotImplementedError


def rows_of(sizes: Sequence[Any], dims: Sequence[int]) -> Axes:
    """The dimensions `dims` of a value of these sizes as its rows."""
    return tuple(dim for dim in dims if not same_size(sizes[dim], 1))


def axes_after(node: Node, axes: Mapping[Node, Axes]) -> Axes | None:
    """The rows of what an operator computes of each token alone; None where it mixes tokens, or is not known not to.

    `axes`: of the operands that are computed from tokens; others are the same for all tokens, or known beforehand for each.
    """
    given = [operand for operand in node.all_input_nodes if operand in axes]
    if op(node) in COPIES:  # of the first; another one tells a dtype
        return axes.get(node.args[0])  # type: ignore[call-overload]
    if node.target is operator.getitem:
        return axes[given[0]]
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return None
    name = op(node)
    if name == "aten.dropout.default" or pointwise(node):
        return _of_elements(node, given, axes)
    if name in ("aten.cat.default", "aten.stack.default"):
        return _joined(node, given, axes)
    if len(given) != 1:
        return None
    (source,) = given
    before, rows, rank = shape(source), axes[source], len(shape(source))
    if name in _PRODUCTS:
        weight = node.args[_PRODUCTS[name] + 1]
        return rows if node.args[_PRODUCTS[name]] is source and len(shape(weight)) == 2 and rank - 1 not in rows else None
    if node.args[0] is not source:
        return None
    if name in _NORMS:
        return rows if all(dim < rank - len(node.args[1]) for dim in rows) else None  # type: ignore[arg-type]
    if name in VIEWS:
        return viewed(before, shape(node), rows)
    if name == "aten.expand.default":
        return _of_elements(node, given, axes)
    if (order := order_of(node)) is not None:
        return tuple(order.index(dim) for dim in rows)
    if name in _ALONG or name in _REDUCTIONS:
        dims = node.args[1] if len(node.args) > 1 else None
        along = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or range(rank))}  # type: ignore[union-attr, operator]
        if along & set(rows):
            return None
        kept = len(shape(node)) == rank
        return rows if kept else tuple(dim - sum(gone < dim for gone in along) for dim in rows)
    if name in _PARTS:
        return rows if argument(node, 2, "dim", 0) % rank not in rows else None
    if name == "aten.slice.Tensor":
        dim = argument(node, 1, "dim", 0) % rank
        return rows if dim not in rows or same_size(before[dim], shape(node)[dim]) else None
    if name in ("aten.select.int", "aten.unbind.int"):
        dim = argument(node, 1, "dim", 0) % rank
        return tuple(d - (dim < d) for d in rows) if dim not in rows else None
    return None


def _of_elements(node: Node, given: Sequence[Node], axes: Mapping[Node, Axes]) -> Axes | None:
    """Of an operator that broadcasts its operands."""
    after, found = shape(node), set()
    for operand in given:
        before = shape(operand)
        shift = len(after) - len(before)
        if not all(same_size(before[dim], after[dim + shift]) for dim in axes[operand]):
            return None
        found.add(tuple(dim + shift for dim in axes[operand]))
    if len(found) != 1:
        return None
    (rows,) = found
    # What broadcasts along another dimension copies whole rows; along a row of size 1 it would make more of them, and none is left out.
    return rows


def _joined(node: Node, given: Sequence[Node], axes: Mapping[Node, Axes]) -> Axes | None:
    parts: Sequence[Node] = node.args[0]  # type: ignore[assignment]
    dim, found = argument(node, 1, "dim", 0) % len(shape(node)), {axes[part] for part in given}
    if len(found) != 1:
        return None
    (rows,) = found
    if op(node) == "aten.stack.default":
        return tuple(d + (d >= dim) for d in rows)
    if dim in rows:  # beside nothing but an empty cache
        return rows if len(given) == 1 and all(part is given[0] or empty(part) for part in parts) else None
    return rows


def empty(node: Node) -> bool:
    """Whether a tensor has no elements."""
    return any(same_size(size, 0) for size in shape(node))


def viewed(before: Sequence[Any], after: Sequence[Any], rows: Axes) -> Axes | None:
    """The rows of a value of sizes `before` once it is seen with sizes `after`; None where rows and other dimensions are merged."""
    moved: dict[int, Axes] = {}
    for source, target in _groups(before, after):
        old, new = rows_of(before, source), rows_of(after, target)
        inside = [dim for dim in rows if dim in old]
        if not inside:
            continue
        first = rows.index(old[0]) if old[0] in rows else -1
        if tuple(rows[first : first + len(old)]) != old:
            return None
        moved.update({old[0]: new, **dict.fromkeys(old[1:], ())})
    if not moved.keys() >= set(rows):
        return None
    return tuple(dim for old in rows for dim in moved[old])


def _groups(before: Sequence[Any], after: Sequence[Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of neighbouring dimensions, of the one and of the other, that hold the same elements; none where sizes don't tell."""
    i = j = 0
    while i < len(before) and j < len(after):
        source, target = [i], [j]
        p, q = before[i], after[j]
        i, j = i + 1, j + 1
        while not same_size(p, q):
            small = optimization_hint(p) < optimization_hint(q)
            if small and i < len(before):
                source, p, i = [*source, i], p * before[i], i + 1
            elif not small and optimization_hint(p) != optimization_hint(q) and j < len(after):
                target, q, j = [*target, j], q * after[j], j + 1
            else:
                return
        yield source, target
