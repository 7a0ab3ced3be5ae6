"""Find FFN regions: y = down(dropout(act(up_1(x), ..., up_k(x)))), with `act` any elementwise graph.

From every projection, walk back through what computes its input until projections are reached. What lies between may be any graph of
elementwise operators; it is never matched against a list of known activations.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx import Node

from sptc.ir.region import FfnRegion, Found, Lora, Projection, Refusal
from sptc.passes.graph.boundary import breach
from sptc.passes.graph.elementwise import bends, elementwise, function
from sptc.passes.graph.frame import parameter
from sptc.passes.graph.pattern import (
    TRANSPARENT,
    VIEWS,
    aten,
    base_name,
    before_dropout,
    dtype,
    keeps_last_axis,
    match_adapters,
    match_projection,
    op,
    origin_of_units,
    same_size,
    shape,
    transparent,
    units,
    value,
)
from sptc.passes.graph.site import called, parameter_path, site_of

# Operators that mix hidden units: a region with one of them between its projections is reported, not rewritten.
MIXING = aten(
    *("softmax.int", "_softmax.default", "log_softmax.int", "layer_norm.default", "rms_norm.default"),
    *("group_norm.default", "cumsum.default", "mean.dim", "sum.dim_IntList", "amax.default"),
    *("var.correction", "linalg_vector_norm.default", "roll.default", "flip.default"),
)


def find_ffn(gm: fx.GraphModule) -> Found:
    """FFN regions and refusals of one graph; bodies of checkpoints are graphs of their own."""
    regions: list[FfnRegion] = []
    refusals: list[Refusal] = []
    covered: set[Node] = set()
    refused: set[Node] = set()  # hidden values; one refusal is enough for all that reads one
    for node in reversed(gm.graph.nodes):
        if node in covered or transparent(node) or op(node) in VIEWS:
            continue
        several = match_adapters(node)
        down = match_projection(node) if several is None else several[0]
        if down is None:
            continue
        covered |= down.nodes
        if several is not None:
            covered |= {node for lora in several[1] if (low := match_projection(lora.low)) is not None for node in low.nodes}
            if _region(down) is not None:
                refusals.append(Refusal("ffn", "adapters", node, _several(node, several[1]), site_of(down.nodes)))
            continue
        if down.rows is not None:
            continue
        result = _region(down)
        if isinstance(result, FfnRegion):
            regions.append(result)
            covered |= result.nodes
        elif result is not None and before_dropout(down.x) not in refused:
            refused.add(before_dropout(down.x))
            refusals.append(result)
    return Found(tuple(reversed(regions)), tuple(reversed(refusals)))


def _several(node: Node, adapters: Sequence[Lora]) -> str:
    names = [".".join(parameter_path(parameter(lora.a))[-3:-1]) or called(lora.a) for lora in adapters]
    return f"{called(node)} is a projection with {len(adapters)} active adapters ({', '.join(names)}); a region has one: merge the others"


def _may_be_ffn(start: Node, hidden: Any) -> bool:
    """A look ahead: does what computes `start` reach projections, and is it more than the residual stream behind a normalisation?

    Breadth first, so that the stream is recognised at its nearest layers instead of being walked to the embedding.
    """
    queue, seen = deque([start]), {start}
    inputs: set[Node] = set()
    mixing = stranger = nonlinear = False
    while queue:
        node = queue.popleft()
        name = op(node)
        up = match_projection(node)
        following: list[Node] = []
        if up is not None and same_size(shape(node)[-1], hidden):
            inputs.add(origin_of_units(up.x))
        elif transparent(node) or name == "aten.dropout.default" or (name in VIEWS and keeps_last_axis(node)):
            following = node.all_input_nodes[:1]
        elif name in TRANSPARENT:
            nonlinear, following = True, node.all_input_nodes[:1]
        elif name in MIXING:
            mixing, following = True, node.all_input_nodes[:1]
        elif shape(node) and elementwise(node):
            nonlinear = nonlinear or bends(node)
            following = node.all_input_nodes
        elif _is_unit_parameter(node):
            mixing = True
        else:
            stranger = True
        if mixing and (stranger or len(inputs) > 1):
            return False
        queue.extend(n for n in following if n not in seen)
        seen.update(following)
    return bool(inputs) and (nonlinear or not stranger)


def _is_unit_parameter(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr") and len(shape(node)) == 1


@dataclass
class _Walk:
    """What a walk back from a projection's input met."""

    hidden: Any  # size of the unit axis
    ups: dict[Node, Projection] = field(default_factory=dict)
    nodes: set[Node] = field(default_factory=set)
    reached: dict[Node, frozenset[Node]] = field(default_factory=dict)  # ups that a node is computed from, by what was walked through
    bent: set[Node] = field(default_factory=set)  # ups that a function is applied to
    linear: bool = True  # so far all of it is a sum of ups times numbers
    problem: tuple[str, Node, str] | None = None  # the first (rule, node, reason) that forbids the region
    dropout_p: float = 0.0

    def refuse(self, rule: str, node: Node, reason: str) -> None:
        if self.problem is None:
            self.problem = (rule, node, reason)


def _region(down: Projection) -> FfnRegion | Refusal | None:
    """The region that ends in `down`, why it is refused, or None when `down` does not end an FFN."""
    hidden = shape(down.x)[-1] if shape(down.x) else None
    if not isinstance(hidden, int):
        return None
    if not _may_be_ffn(down.x, hidden):
        return None
    walk = _Walk(hidden)
    _follow(_after_dropout(down.x, walk), walk)
    # A gated activation reads alike however it is spelled: what a function is applied to comes first.
    ups = tuple(sorted(walk.ups.values(), key=lambda up: up.y not in walk.bent))
    if walk.problem is None and walk.linear:
        return None  # a LoRA pair, a plain stack of projections
    nodes = frozenset(walk.nodes.union(down.nodes, _adapter_nodes(down, walk.nodes), *(up.nodes for up in ups)))
    site = site_of(nodes)
    if walk.problem is None:
        _check_inputs(ups, walk)
    found = breach(nodes, down.y) if walk.problem is None else None
    if found is not None:
        walk.refuse(found.rule, found.node, found.reason)
    if walk.problem is not None:
        rule, node, reason = walk.problem
        return Refusal("ffn", rule, node, reason, site)
    return FfnRegion(
        x=ups[0].x,
        y=down.y,
        ups=ups,
        down=down,
        activation=_spelled(walk.nodes),
        dropout_p=walk.dropout_p,
        hidden=hidden,
        nodes=nodes,
        site=site,
    )


def _after_dropout(node: Node, walk: _Walk) -> Node:
    """The activation's value below the dropout that stands directly before the down projection."""
    chain = list(units(node))
    dropout = chain[-1]
    if op(dropout) != "aten.dropout.default":
        return node
    walk.nodes.update(chain)
    below, p, train = dropout.args
    if train:
        walk.dropout_p = float(p)  # type: ignore[arg-type]
    return below  # type: ignore[return-value]


def _follow(node: Node, walk: _Walk) -> frozenset[Node]:
    """The ups that `node` is computed from; problems are noted in `walk`, and the walk goes on to learn what is there."""
    if node not in walk.reached:
        walk.reached[node] = _follow_node(node, walk)
    return walk.reached[node]


def _follow_node(node: Node, walk: _Walk) -> frozenset[Node]:
    up = match_projection(node)
    if up is not None and same_size(shape(node)[-1], walk.hidden):
        walk.ups[node] = up
        return frozenset({node})
    several = match_adapters(node)
    if several is not None and same_size(shape(node)[-1], walk.hidden):
        walk.refuse("adapters", node, _several(node, several[1]))
        walk.ups[node] = several[0]
        return frozenset({node})
    name = op(node)
    if not name or not shape(node):
        return _stranger(node, walk)
    if transparent(node) or (name in VIEWS and keeps_last_axis(node)):
        return _descend(node, walk)
    if name == "aten.dropout.default":
        if node.args[2] and node.args[1]:
            walk.refuse("dropout", node, f"dropout {called(node)} is inside the activation, not between it and the down projection")
        return _descend(node, walk)
    if name in TRANSPARENT:
        walk.refuse("activation", node, f"{called(node)} rounds to {dtype(node)} or from {dtype(node.args[0])}")
        return _descend(node, walk)
    if name in MIXING:
        walk.refuse("activation", node, f"{called(node)} ({name}) mixes hidden units")
        return _descend(node, walk)
    if not elementwise(node):
        return _stranger(node, walk)
    walk.nodes.add(node)
    tensors = [arg for arg in node.all_input_nodes if isinstance(value(arg), torch.Tensor)]  # dynamic shapes make nodes of numbers too
    ups = frozenset[Node]().union(*(_follow(arg, walk) for arg in tensors))
    walk.linear = walk.linear and not bends(node)
    if function(node):
        walk.bent |= ups
    for arg in tensors:
        if len(shape(arg)) != len(shape(node)) or not all(map(same_size, shape(arg), shape(node))):
            walk.refuse(
                "shape", node, f"{called(node)} ({name}) combines {called(arg)} {list(shape(arg))} into {list(shape(node))}: it broadcasts"
            )
    return ups


def _descend(node: Node, walk: _Walk) -> frozenset[Node]:
    walk.nodes.add(node)
    return _follow(node.args[0], walk)  # type: ignore[arg-type]


def _stranger(node: Node, walk: _Walk) -> frozenset[Node]:
    if _is_unit_parameter(node):
        walk.refuse("activation", node, f"{called(node)} gives each hidden unit a parameter of its own inside the activation")
    else:
        walk.refuse("operand", node, f"{called(node)} enters the activation and is computed by {_computer(node)}")
    return frozenset()


def _computer(node: Node) -> str:
    """What computes a value that no projection does: a call that is kept whole has a name that tells quantized weights."""
    while node.target is operator.getitem:
        (node, _) = node.args  # type: ignore[assignment]
    if node.op != "call_function" or (isinstance(node.target, OpOverload) and node.target.namespace in ("aten", "prims")):
        return "no projection of the input"
    name = node.target.__name__ if not isinstance(node.target, OpOverload) else str(node.target)
    return f"{name}, a call that is kept as it is, as those on quantized weights are"


def _spelled(nodes: set[Node]) -> str:
    """The activation for people: its operators in order, such as "silu, mul"."""
    graph = next(iter(nodes)).graph
    return ", ".join(base_name(node).split(".")[1] for node in graph.nodes if node in nodes and elementwise(node))


def _check_inputs(ups: tuple[Projection, ...], walk: _Walk) -> None:
    first = ups[0]
    for up in ups[1:]:
        if origin_of_units(up.x) is not origin_of_units(first.x) or dtype(up.x) is not dtype(first.x):
            walk.refuse("inputs", up.y, f"the projections {called(first.y)} and {called(up.y)} read different inputs")
            return


def _adapter_nodes(down: Projection, region: set[Node]) -> set[Node]:
    """The nodes that compute the down projection's low-rank input from the activation."""
    nodes: set[Node] = set()
    pending = [down.lora.low] if down.lora is not None else []
    while pending:
        node = pending.pop()
        if node in nodes or node in region or node.op in ("placeholder", "get_attr"):
            continue
        nodes.add(node)
        pending += node.all_input_nodes
    return nodes
