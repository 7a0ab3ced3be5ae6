"""Which tokens count in a graph's loss, for the option ffn.keep: those whose label its cross entropy does not ignore.

Labels are inputs of the graph, so the mask is computed before the first layer. It has the shape of the loss's target; what the model did to
the rows of its logits on their way to the loss (flattened them, cut off the last position of each sequence) is undone to reach its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from sptc.ir.hint import optimization_hint
from sptc.ir.region import Counted, FfnRegion, Step
from sptc.passes.graph.effects import alias_sets, written_by
from sptc.passes.graph.frame import frames
from sptc.passes.graph.insert import insert
from sptc.passes.graph.pattern import TRANSPARENT, argument, dtype, op, same_size, shape
from sptc.passes.graph.rows import Rows, UnreadableRows, brought_back, sized
from sptc.passes.graph.site import called

LOSSES = {f"aten.{name}.default" for name in ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "nll_loss_forward")}
_ROW_BY_ROW = TRANSPARENT | {"aten.log_softmax.int", "aten._log_softmax.default", "aten.tanh.default"}
_SCALINGS = {"aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"}
_LONGEST = 64  # nodes that compute a target from inputs


class _NotCounted(Exception):
    """Why it is not known which tokens count."""


def find_counted(gm: fx.GraphModule) -> Counted | str | None:
    """Which tokens count in the loss of a graph, or why that is not known; None for a graph without a cross entropy."""
    losses = [node for frame in frames(gm) for node in frame.gm.graph.nodes if op(node) in LOSSES]
    try:
        return _counted(gm, losses) if losses else None
    except (_NotCounted, UnreadableRows) as reason:
        return str(reason)


def fits(given: Sequence[Any], region: FfnRegion) -> bool:
    """Whether a region's tokens are those of a mask with the dimensions `given`, by their sizes."""
    lead = shape(region.x)[:-1]
    if len(lead) == len(given):
        return all(same_size(a, b) for a, b in zip(lead, given, strict=True))
    return 1 in (len(lead), len(given)) and same_size(math.prod(lead), math.prod(given))


def counted_share(gm: fx.GraphModule, counted: Counted, example_inputs: Sequence[Any]) -> float | None:
    """The share of the example batch's tokens that count; None where the inputs are fakes."""
    if any(isinstance(x, FakeTensor) for x in example_inputs):
        return None
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in gm.graph.find_nodes(op="placeholder")}
    for node in counted.chain:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(copies[counted.target])
    inputs = [optimization_hint(x) if isinstance(x, torch.SymInt) else x for x in example_inputs]  # real tensors go with numbers
    with torch.no_grad():
        labels = fx.Interpreter(fx.GraphModule(gm, graph)).run(*inputs)
    return float((labels != counted.ignored).sum()) / max(1, optimization_hint(math.prod(counted.lead)))


def insert_mask(gm: fx.GraphModule, counted: Counted) -> Node:
    """Insert what computes the mask, bool [N], after the inputs of the graph; returns its node."""
    anchor = next(node for node in gm.graph.nodes if node.op != "placeholder")
    copies: dict[Node, Node] = {}
    with gm.graph.inserting_before(anchor):
        for node in counted.chain:
            copies[node] = gm.graph.node_copy(node, lambda n: copies.get(n, n))
    read = {node: copies.get(node, node) for node in (counted.target, *sized(counted.undo))}
    mask: Node = insert(
        anchor, lambda t: brought_back(t[counted.target] != counted.ignored, counted.undo, False, t), read, like=counted.target
    )
    return mask


def _counted(gm: fx.GraphModule, losses: Sequence[Node]) -> Counted:
    loss = losses[0]
    if len(losses) > 1:
        raise _NotCounted(f"the graph computes {len(losses)} cross entropies")
    if loss.graph is not gm.graph:
        raise _NotCounted("the loss is computed inside an activation checkpoint")
    logits, target, ignored = loss.args[0], loss.args[1], argument(loss, 4, "ignore_index", -100)
    target_dtype = dtype(target)
    if not isinstance(logits, Node) or not isinstance(target, Node) or target_dtype is None or target_dtype.is_floating_point:
        raise _NotCounted("the target of the loss holds probabilities, not labels")
    if not isinstance(ignored, int):
        raise _NotCounted("the loss's ignore_index is no constant")
    if len(shape(logits)) != len(shape(target)) + 1 or not shape(target):
        raise _NotCounted("the loss is of a single label")
    chain = _from_inputs(gm, target)
    known = [*gm.graph.find_nodes(op="placeholder"), *chain]
    undo, lead, rows_of, axis = _undo(logits, known)
    return Counted(logits, target, ignored, chain, undo, lead, rows_of, axis)


def _from_inputs(gm: fx.GraphModule, target: Node) -> tuple[Node, ...]:
    """The nodes that compute `target` from inputs of the graph."""
    found, pending = {target}, [target]
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):
                raise _NotCounted("the target of the loss is computed from the model's parameters or buffers")
        elif node.op == "get_attr":
            if isinstance(getattr(gm, str(node.target), None), nn.Parameter):
                raise _NotCounted("the target of the loss is computed from the model's parameters or buffers")
        elif node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator) or _random(node):
            raise _NotCounted(f"the target of the loss is computed by {op(node) or called(node)}")
        fresh = [n for n in node.all_input_nodes if n not in found]
        found.update(fresh)
        pending += fresh
        if len(found) > _LONGEST:
            raise _NotCounted("the target of the loss is not computed from inputs in a few steps")
    written = [t for node in gm.graph.nodes for t in written_by(node)]
    if written:
        aliases = alias_sets(gm.graph)
        if {aliases[t] for t in written} & {aliases[node] for node in found}:
            raise _NotCounted("the target of the loss, or what it is computed from, is changed in place")
    return tuple(node for node in gm.graph.nodes if node in found and node.op != "placeholder")


def _random(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _undo(logits: Node, known: Sequence[Node]) -> tuple[tuple[Step, ...], tuple[Any, ...], Node, int]:
    """The steps from the rows of the loss's input back to those of what it was before views and slices, their sizes then, that node, and
    which of its dimensions is none of rows."""
    node, rows, projected = logits, Rows(known), False
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        name, source = op(node), node.args[0]
        if name in _ROW_BY_ROW or (name in _SCALINGS and not isinstance(node.args[1], Node)):
            pass
        elif name == "aten.linear.default" and rows.axis == len(shape(node)) - 1 and not projected:
            projected, rows.axis = True, len(shape(source)) - 1
        elif not rows.back(node):
            break
        node = source
    return tuple(rows.steps), rows.lead(node), node, rows.axis
