"""Is a set of nodes a closed region? Only its output is used outside, nothing it reads changes under it, and no mode switches inside it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch.fx import Node

from sptc.passes.graph.effects import alias_sets, written_by
from sptc.passes.graph.pattern import is_mode_change, op


@dataclass(frozen=True)
class Breach:
    """Why a set of nodes is not a closed region."""

    rule: str  # "escapes", "mutated" or "mode-boundary"
    node: Node
    reason: str


def breach(nodes: Collection[Node], y: Node, leaving: Collection[Node] = (), casts: bool = False) -> Breach | None:
    """Why `nodes` can't be replaced by one operator that stands where `y` stands; None when they can.

    Args:
        leaving: users outside that don't count.
        casts: autocast may switch inside, since the operator's operands are cast to its dtype explicitly.
    """
    inside = frozenset(nodes)
    return _escape(inside, y, leaving) or _switch(inside, y, casts) or _mutation(inside, y)


def _escape(inside: frozenset[Node], y: Node, leaving: Collection[Node]) -> Breach | None:
    for node in y.graph.nodes:
        if node not in inside or node is y:
            continue
        outside = [user for user in node.users if user not in inside and user not in leaving]
        if outside:
            return Breach("escapes", node, f"the intermediate {node.name} ({op(node) or node.op}) is also used by {outside[0].name}")
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
            return Breach("mode-boundary", node, f"{node.name} switches autocast or grad mode inside the region")
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
            return Breach("mutated", node, f"{node.name} ({op(node)}) changes {target.name} in place while the region reads it")
    return None


def disturbance(seen_through: Collection[Node], y: Node) -> Breach | None:
    """Why an operator that stands where `y` stands can't read what `seen_through` were computed from; None when it can.

    Each of them read its arguments where it stood: from there to `y`, nothing may be written to these arguments or to what it computed,
    and gradients may not be switched on or off.
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
            return Breach("mode-boundary", node, f"{node.name} switches gradients between an operand's scale or layout and its use")
        for target in written_by(node):
            if aliases[target] in read:
                return Breach("mutated", node, f"{node.name} ({op(node)}) changes {target.name} in place before the region would read it")
    return None


def _switches_gradients(node: Node) -> bool:
    return is_mode_change(node) and "autocast" not in str(getattr(node.target, "__name__", ""))
