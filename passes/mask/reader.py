"""Reads one element of a graph node as a term of its indices, by walking the operators that build the tensor.

`Reader.element(node, at)` answers "what is node[at]?" for symbolic positions `at`. Each operator has one rule, which asks for elements of
its arguments in turn; an operator without a rule ends the walk, and its tensor stays as an operand of the term. No rule looks at values
of the example inputs: what is read holds for every input of the same shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from sptc.ir.condition import Element, Size
from sptc.passes.graph.effects import alias_sets, written_by
from sptc.passes.graph.pattern import dtype, op, plain_number, same_size, shape, value
from sptc.passes.graph.site import called
from sptc.passes.mask import positions as mask_positions  # noqa: F401  they fill RULES
from sptc.passes.mask import terms
from sptc.passes.mask import values as mask_values  # noqa: F401  they fill RULES
from sptc.passes.mask.rules import RULES, At, exact
from sptc.passes.mask.terms import ZERO, Linear, Number, Term, Unreadable

_SIZE_ARITHMETIC: dict[Any, Callable[..., Number]] = {
    operator.add: terms.add,
    operator.sub: terms.subtract,
    operator.mul: terms.multiply,
    operator.neg: terms.negate,
}


class Reader:
    """Reads elements of the nodes of one graph.

    Args:
        outer: for the body of a checkpoint: what each of its placeholders is in the graph around it. Reading goes on there.
    """

    def __init__(self, outer: Mapping[Node, Node] | None = None) -> None:
        self._outer = outer or {}
        self._writers: dict[Graph, Mapping[Node, Sequence[Node]]] = {}
        self._sizes: dict[Graph, Mapping[Any, Node]] = {}
        self._memo: dict[tuple[Node, At], Term] = {}

    def element(self, node: Node, at: At, before: Node | None = None) -> Term:
        """The term for node[at]: a truth if the tensor is boolean, else a number.

        Args:
            at: one index a dimension.
            before: the in-place operator that reads `node` before it writes there; None for readers that come after every write.

        Raises:
            Unreadable: the tensor is changed in place after `node` was computed.
        """
        if not self._settled(node, before):
            raise Unreadable(f"{called(node)} is changed in place")
        key = (node, at)
        if key not in self._memo:
            self._memo[key] = self._read(node, at)
        return self._memo[key]

    def _read(self, node: Node, at: At) -> Term:
        rule = RULES.get(op(node) or node.op)
        if rule is not None:
            try:
                term = exact(rule(self, node, at), dtype(node))
                # What it wrote to is no longer what it read.
                if not any(isinstance(atom, Element) and node in self._writers_of(atom.position) for atom in terms.atoms(term)):
                    return term
            except Unreadable:
                pass
        return _leaf(node, at)

    def _settled(self, node: Node, before: Node | None) -> bool:
        writers = self._writers_of(node)
        return all(w is node or w < node for w in writers if before is None or w < before)

    def _writers_of(self, node: Node) -> Sequence[Node]:
        graph = node.graph
        if graph not in self._writers:
            self._writers[graph] = _writers(graph)
        return self._writers[graph].get(node, ())

    def argument(self, arg: Any, at: At, before: Node | None = None) -> Term:
        """The element of an argument that broadcasts against `at`: a tensor node, a size, or a number."""
        if isinstance(arg, Node) and isinstance(value(arg), torch.Tensor):
            sizes = shape(arg)
            tail = at[len(at) - len(sizes) :]
            return self.element(arg, tuple(ZERO if same_size(s, 1) else i for s, i in zip(sizes, tail, strict=True)), before)
        return self.scalar(arg)

    def number(self, arg: Any, at: At, before: Node | None = None) -> Number:
        return terms.as_number(self.argument(arg, at, before))

    def scalar(self, arg: Any) -> Term:
        """A number, a truth value, or a node that computes a size."""
        if isinstance(arg, bool):
            return arg
        if isinstance(arg, int | float):
            return Linear(arg)
        known = value(arg)
        if isinstance(known, torch.SymFloat):
            known = plain_number(known)
        if isinstance(known, int | float):
            return Linear(known)
        if isinstance(arg, Node) and arg.target in _SIZE_ARITHMETIC:
            return _SIZE_ARITHMETIC[arg.target](*(terms.as_number(self.scalar(a)) for a in arg.args))
        if isinstance(known, torch.SymInt):
            return self.size(known, arg)
        raise Unreadable(f"{arg} is no number")

    def constant(self, arg: Any) -> float | None:
        """The one number that an argument holds in all its elements; None if it depends on anything."""
        if isinstance(arg, Node) and not all(same_size(size, 1) for size in shape(arg)):
            return None
        try:
            number = self.number(arg, (ZERO,) * (len(shape(arg)) if isinstance(arg, Node) else 0))
        except Unreadable:
            return None
        return float(number.constant) if isinstance(number, Linear) and number.is_constant else None

    def size(self, size: Any, node: Node | None = None) -> Linear:
        """A dimension of a shape; `node` is searched in the graph when it is symbolic and not given."""
        if isinstance(size, int):
            return Linear(size)
        if node is None:
            raise Unreadable(f"no node computes the size {size}")
        while node in self._outer:
            node = self._outer[node]
        return terms.linear(Size(terms.SizeOf(size.node.expr, node)))

    def dimension(self, node: Node, dim: int) -> Linear:
        """node.shape[dim]."""
        size = shape(node)[dim]
        return self.size(size, None if isinstance(size, int) else self._size_node(node.graph, size))

    def _size_node(self, graph: Graph, size: Any) -> Node | None:
        if graph not in self._sizes:
            self._sizes[graph] = {value(n).node.expr: n for n in reversed(list(graph.nodes)) if isinstance(value(n), torch.SymInt)}
        return self._sizes[graph].get(size.node.expr)

    def outer(self, node: Node) -> Node | None:
        return self._outer.get(node)


def _leaf(node: Node, at: At) -> Term:
    for index in at:
        least, _ = terms.bounds(index)
        if least < 0:
            raise Unreadable(f"an index of {called(node)} may be negative")
    element = terms.element_of(node, tuple(ZERO if same_size(s, 1) else i for i, s in zip(at, shape(node), strict=True)))
    return element if terms.boolean(element) else terms.linear(element)


def _writers(graph: Graph) -> Mapping[Node, Sequence[Node]]:
    """For each node, the operators that change its memory in place; nodes of unchanged memory are left out."""
    written = [(node, arg) for node in graph.nodes for arg in written_by(node)]
    if not written:
        return {}
    aliases = alias_sets(graph)
    return {node: found for node in graph.nodes if (found := [w for w, arg in written if aliases[arg] == aliases[node]])}
