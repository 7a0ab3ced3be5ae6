"""Sparse forms are plain functions of tensors. Here one is traced into a graph: at its place, and under the autocast that is there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from sptc.passes.graph.effects import after_writes, written_values
from sptc.passes.graph.modes import autocast_dtype, autocast_like
from sptc.passes.graph.pattern import value

_PLACE = ("nn_module_stack", "stack_trace", "source_fn_stack")
_TRACED = ("val", "unbacked_bindings", "recompute", "ac_graph_id")


_traced: WeakKeyDictionary[Any, dict[Any, tuple[Graph, Any]]] = WeakKeyDictionary()  # by fake mode, hence for one compile


def insert(before: Node, function: Callable[..., Any], *operands: Any, like: Node | None = None, alike: Hashable = None) -> Any:
    """Insert what a function computes before a node of a graph.

    Args:
        before: the node.
        function: of tensors, sizes and constants. It is run once, on fakes; operators that are made of others stay whole.
        operands: its arguments. Nodes stand for what they compute, also inside tuples, lists and dicts.
        like: the node whose place in the user's model the new ones have; `before` without it.
        alike: equal for functions that compute the same of operands of the same kinds, as in the layers of a model: one of them is traced.

    Returns:
        What the function returns, with nodes for tensors.
    """
    like = like or before
    leaves, spec = pytree.tree_flatten(operands)
    nodes = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Node)))
    device, fake_mode = value(like).device.type, detect_fake_mode([value(like)])
    assert fake_mode is not None
    places = tuple(nodes.index(leaf) if isinstance(leaf, Node) else (leaf,) for leaf in leaves)
    key = alike and (alike, autocast_dtype(before, device), places, tuple(map(_kind, nodes)))
    known = _traced.setdefault(fake_mode, {})
    if key is None or key not in known:
        specs = []

        def run(*values: Any) -> list[Any]:
            given = [values[place] if isinstance(place, int) else place[0] for place in places]
            results, returned = pytree.tree_flatten(function(*pytree.tree_unflatten(given, spec)))
            specs.append(returned)
            return results

        with fake_mode, torch.no_grad(), autocast_like(before, device):
            known[key] = make_fx(run, pre_dispatch=True)(*map(value, nodes)).graph, specs[-1]
    graph, returned = known[key]
    inputs = graph.find_nodes(op="placeholder")
    copies = dict(zip(inputs, nodes, strict=True))
    with before.graph.inserting_before(before):
        results: Any = before.graph.graph_copy(graph, copies)
    for original in copies.keys() - set(inputs):
        meta = {key: original.meta[key] for key in _TRACED if key in original.meta}
        copies[original].meta = meta | {key: like.meta[key] for key in _PLACE if key in like.meta}
    return pytree.tree_unflatten(list(results), returned)


def kept(before: Node, nodes: Iterable[Node]) -> dict[Node, Node]:
    """What an operator before a node is to read in the place of each of `nodes`: a copy of what is written to behind it.

    It keeps what it reads for backward, where the operators that it replaces may not have, so that the user's program could write to it.
    """
    written = written_values(before.graph, behind=before)
    return {node: insert(before, torch.clone, node) if node in written else node for node in nodes}


def _kind(node: Node) -> Hashable:
    """What tracing sees of an operand."""
    known = value(node)
    return (known.dtype, known.device, str(known.shape), str(known.stride())) if isinstance(known, Tensor) else str(known)


def keep_gradient(node: Node, like: Node) -> None:
    """Let an inserted node be known to carry a gradient if `like` carries one (`pattern.requires_grad`): tracing does not tell."""
    if "tensor_meta" in like.meta:
        node.meta["tensor_meta"] = like.meta["tensor_meta"]._replace(shape=value(node).shape, stride=value(node).stride())


def recomputed(x: Tensor) -> Tensor:
    """`x`, to be computed again in backward and not kept until then, where a function is traced. Not for random numbers."""
    mode = get_proxy_mode()
    if mode is not None:
        # The partitioner wants to know which checkpoint a mark is of; those of checkpoints count from 1.
        node = get_proxy_slot(x, mode.tracer).proxy.node
        node.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=0)
    return x


def forget_marks(graph: Graph) -> None:
    """Let what follows from an input that the graph changes in place be kept for backward, which would compute it of what was written."""
    for node in after_writes(graph):
        if node.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE:
            del node.meta["recompute"], node.meta["ac_graph_id"]


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` in a dtype; None: in its own."""
    return x if dtype is None or x.dtype == dtype else x.to(dtype)


def as_rows(x: Tensor) -> Tensor:
    """[..., d] as [N, d]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
