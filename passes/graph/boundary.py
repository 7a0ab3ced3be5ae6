"""Whether a set of nodes can be replaced by one operator.

Such a set is closed: only its output is used by other nodes, no operator writes to what it reads while it runs, and neither autocast nor
grad mode is switched inside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch.fx import Node

from sptc.passes.graph.effects import alias_sets, written_by
from sptc.passes.graph.pattern import is_mode_change, op
from sptc.passes.graph.site import called


@dataclass(frozen=True)
class Breach:
    """A reason why a set of nodes is not closed, for people."""

    rule: str  # "escapes", "mutated" or "mode-boundary"
    node: Node
    reason: str


def breach(nodes: Collection[Node], y: Node, leaving: Collection[Node] = (), casts: bool = False) -> Breach | None:
    """The first reason why `nodes` can't be replaced by one operator at the place of `y`; None if there is none.

    Args:
        nodes: the set, all of one graph.
        y: the output of the set, its last node.
        leaving: nodes outside of the set that may use what is inside.
        casts: whether autocast may be switched inside the set. That is so where the operator's operands are cast to its dtype explicitly.
    """
    inside = frozenset(nodes)
    return _escape(inside, y, leaving) or _switch(inside, y, casts) or _mutation(inside, y)


def _escape(inside: frozenset[Node], y: Node, leaving: Collection[Node]) -> Breach | None:
    for node in y.graph.nodes:
        if node not in inside or node is y:
            continue
        outside = [user for user in node.users if user not in inside and user not in leaving]
        if outside:
            return Breach("escapes", node, f"the intermediate {called(node)} ({op(node) or node.op}) is also used by {called(outside[0])}")
    return None


def _between(inside: frozenset[Node], y: Node) -> Iterator[Node]:
    """The nodes from the region's first to `y`, in order."""
    started = False
    for node in y.graph.nodes:
        started = started or node in inside
        if started:
            yield node
        if node is y:
            return


def _switch(inside: frozenset[Node], y: Node, casts: bool) -> Breach | None:
    for node in _between(inside, y):
        if _switches_gradients(node) or (is_mode_change(node) and not casts):
            return Breach("mode-boundary", node, f"{called(node)} switches autocast or grad mode inside the region")
    return None


def _mutation(inside: frozenset[Node], y: Node) -> Breach | None:
    writes = [(node, target) for node in _between(inside, y) for target in written_by(node)]
    if not writes:
        return None
    aliases = alias_sets(y.graph)
    read = {aliases[arg] for node in inside for arg in node.all_input_nodes}
    for node, target in writes:
        if node in inside and target in inside and all(len(n.users) == 1 for n in inside if n < node and aliases[n] == aliases[target]):
            continue  # the in-place spelling of an activation, on a value that nothing else reads
        if aliases[target] in read:
            return Breach("mutated", node, f"{called(node)} ({op(node)}) changes {called(target)} in place while the region reads it")
    return None


def disturbance(seen_through: Collection[Node], y: Node) -> Breach | None:
    """The first reason why `seen_through` can't be skipped; None if there is none.

    A region may use the inputs of some earlier nodes (a view, a cast, a scale) in place of their outputs. Its operator then reads these
    inputs later than the earlier nodes did, at the place of `y`. In between, no node may write to these inputs or outputs, and gradients
    may not be switched on or off.

    Args:
        seen_through: the earlier nodes.
        y: the output of the region.
    """
    steps = list(_between(frozenset(seen_through), y))
    if not seen_through or not any(written_by(node) or _switches_gradients(node) for node in steps):
        return None
    aliases = alias_sets(y.graph)
    read: set[Node] = set()
    for node in steps:
        if node in seen_through:
            read |= {aliases[n] for n in (node, *node.all_input_nodes)}
        elif _switches_gradients(node):
            return Breach("mode-boundary", node, f"{called(node)} switches gradients between an operand's scale or layout and its use")
        for target in written_by(node):
            if aliases[target] in read:
                return Breach(
                    "mutated", node, f"{called(node)} ({op(node)}) changes {called(target)} in place before the region would read it"
                )
    return None


def _switches_gradients(node: Node) -> bool:
    return is_mode_change(node) and "autocast" not in str(getattr(node.target, "__name__", ""))
