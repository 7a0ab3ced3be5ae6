"""What a node does besides computing its value: what it writes, what may share its memory, and whether it may be dropped unused.

Nothing is taken for harmless because no effect of it is known: an operator is dropped only if it is one of ATen's, prims' or ours whose
schema writes nothing and that draws no random numbers. docs/design/capture.md has the table of kinds. Bodies of higher-order operators
other than checkpoints are Python as Dynamo wrote it, where `h.add_(a)` has no user and a meaning: they are read here, never changed.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from networkx.utils import UnionFind
from torch import fx
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from sptc.passes.graph.pattern import CHECKPOINT, value

_FUNCTIONAL = frozenset({"aten", "prims", "sptc"})  # collectives, profiler marks and the user's own operators have other namespaces
_STATISTICS = frozenset({"running_mean", "running_var"})  # normalizations write to them, which their schemas do not say
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
_ASSIGNMENTS = frozenset(
    f
    for name in ("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
    for f in (getattr(operator, name), f"__{name}__")
)


def has_effects(node: Node) -> bool:
    """Whether a node must stay in the graph, in its place, even if nothing uses its value."""
    if node.op == "get_attr":
        return False
    if node.op != "call_function":
        return True
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return (
            target.namespace not in _FUNCTIONAL
            or target._schema.is_mutable
            or not target._schema.returns  # asserts and prints
            or torch.Tag.nondeterministic_seeded in target.tags
            or bool(written_by(node))
            or node.is_impure()  # registered as such
        )
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    return target is not operator.getitem and not isinstance(value(node), _SYMBOLS)  # arithmetic of sizes


def remove_dead_code(graph: Graph) -> None:
    """Erase what nothing uses and has no effects, in this graph alone: `Graph.eliminate_dead_code` goes into every body."""
    for node in reversed(graph.nodes):
        if not node.users and not has_effects(node):
            graph.erase_node(node)


def written_by(node: Node) -> list[Node]:
    """The tensors that a node changes in place, or may change if it is a higher-order operator that can't be looked into."""
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _written_by_body(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    args = node.args
    return [tensor for i, name in _changed(node.target) for tensor in _nodes(args[i] if i < len(args) else node.kwargs.get(name))]


@functools.cache
def _changed(target: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes to."""
    arguments = enumerate(target._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if (a.alias_info is not None and a.alias_info.is_write) or a.name in _STATISTICS)


def alias_sets(graph: Graph) -> UnionFind:
    """Nodes that may share memory: `sets[a] is sets[b]`.

    Told by the annotations of operators' schemas and by the memory of their fake values: dropout in evaluation returns its argument, which
    its schema does not say.
    """
    sets: UnionFind = UnionFind(graph.nodes)
    memory: dict[int, Node] = {}
    for node in graph.nodes:
        for tensor in pytree.tree_leaves(value(node)):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                sets.union(node, memory.setdefault(tensor.untyped_storage()._cdata, node))
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            if any(r.alias_info is not None for r in schema.returns):
                for i, spec in enumerate(schema.arguments):
                    if spec.alias_info is not None:
                        sets.union(node, *_nodes(node.args[i] if i < len(node.args) else node.kwargs.get(spec.name)))
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            sets.union(node, *_returned_by_body(node))
        elif node.target is operator.getitem:
            sets.union(node, node.args[0])
    return sets


def written_values(graph: Graph, behind: Node | None = None) -> set[Node]:
    """The values whose memory the graph writes to, or does behind a node: they may be other than they were computed."""
    written = [target for node in graph.nodes if behind is None or node > behind for target in written_by(node)]
    if not written:
        return set()
    sets = alias_sets(graph)
    changed = {sets[target] for target in written}
    return {node for node in graph.nodes if sets[node] in changed}


def reads(node: Node) -> set[Node]:
    """The nodes of its graph that a value may depend on, itself included: also by way of memory, whenever it is written."""
    written = [(writer, target) for writer in node.graph.nodes for target in written_by(writer)]
    sets = alias_sets(node.graph) if written else {}
    writers: dict[Any, list[Node]] = {}
    for writer, target in written:
        writers.setdefault(sets[target], []).append(writer)
    waiting, seen = [node], {node}
    while waiting:
        here = waiting.pop()
        near = [*here.all_input_nodes, *(writers.get(sets[here], ()) if written else ())]
        fresh = {n for n in near if n not in seen}
        seen |= fresh
        waiting += fresh
    return seen


def after_writes(graph: Graph) -> set[Node]:
    """The values that follow from an input that the graph changes in place.

    Backward has what such an input holds after the whole of the graph: what it computed again of it would be another value.
    """
    written = [target for node in graph.nodes for target in written_by(node)]
    if not written:
        return set()
    sets = alias_sets(graph)
    inputs = {sets[node] for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    changed = {sets[target] for target in written} & inputs
    found: set[Node] = set()
    for node in graph.nodes:
        follows = sets[node] in changed or not found.isdisjoint(node.all_input_nodes)
        if follows and not isinstance(value(node), _SYMBOLS):
            found.add(node)
    return found


def returns_after_writes(gm: fx.GraphModule) -> bool:
    """Whether a graph returns what follows from an input that it changes in place, or writes in Python's ways, which nobody follows."""
    if any(not isinstance(node.target, torch._ops.OperatorBase) and _writes_in_python(node) for node in gm.graph.nodes):
        return True
    (output,) = gm.graph.find_nodes(op="output")
    return not after_writes(gm.graph).isdisjoint(output.all_input_nodes)


def _nodes(argument: Any) -> list[Node]:
    return [arg for arg in pytree.tree_leaves(argument) if isinstance(arg, Node)]


def _tensors(node: Node) -> list[Node]:
    """The operands of a higher-order operator that may be tensors: neither bodies nor sizes."""
    return [n for n in node.all_input_nodes if not isinstance(_body(n), fx.GraphModule) and not isinstance(value(n), _SYMBOLS)]


def _body(node: Node) -> Any:
    owner = node.graph.owning_module
    return getattr(owner, str(node.target), None) if node.op == "get_attr" and owner is not None else None


def _written_by_body(node: Node) -> list[Node]:
    if node.target is CHECKPOINT:
        body, operands = _checkpoint(node)
        return _that_alias(body.graph, operands, [target for n in body.graph.nodes for target in written_by(n)])
    bodies = [body for n in node.all_input_nodes if isinstance(body := _body(n), fx.GraphModule)]
    if bodies and not any(_writes_in_python(n) for body in bodies for n in body.graph.nodes):
        return []
    return _tensors(node)


def _returned_by_body(node: Node) -> list[Node]:
    """The operands that a higher-order operator may return, or return a view of."""
    if node.target is not CHECKPOINT:
        return _tensors(node)
    body, operands = _checkpoint(node)
    (output,) = body.graph.find_nodes(op="output")
    return _that_alias(body.graph, operands, output.all_input_nodes)


def _checkpoint(node: Node) -> tuple[fx.GraphModule, dict[Node, Node]]:
    """The body of a checkpoint, and what each of its placeholders is outside."""
    body, *passed = node.args
    inner = _body(body)  # type: ignore[arg-type]
    pairs = zip(inner.graph.find_nodes(op="placeholder"), passed, strict=True)
    return inner, {placeholder: operand for placeholder, operand in pairs if isinstance(operand, Node)}


def _that_alias(graph: Graph, operands: dict[Node, Node], nodes: list[Node]) -> list[Node]:
    """The operands of a body that may share memory with one of its nodes."""
    if not nodes:
        return []
    sets = alias_sets(graph)
    roots = {sets[n] for n in nodes}
    return [operand for placeholder, operand in operands.items() if sets[placeholder] in roots]


def _writes_in_python(node: Node) -> bool:
    """Whether a node of a graph as Dynamo wrote it may change a tensor in place."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return bool(_written_by_body(node))
    overloads = [target] if isinstance(target, torch._ops.OpOverload) else []
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    name = str(target) if node.op == "call_method" else str(getattr(target, "__name__", ""))
    return (
        target in _ASSIGNMENTS
        or any(overload._schema.is_mutable for overload in overloads)
        or (name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("out") is not None
        or _inplace(node)
    )


def _inplace(node: Node) -> bool:
    """Whether a function such as `relu` is given inplace=True, by name or by position."""
    if node.op != "call_function":
        return False
    try:
        arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in: no signature, and no such argument
        return False
    return arguments.get("inplace", False) is not False
