"""Find the loss: a cross entropy, what stands between it and the projection onto the classes, and that projection.

From every cross entropy, walk back to the projection. Between them may stand what moves rows (views, slices, transpositions), which is
undone on the labels, and what is computed of each logit alone (casts, scales, a soft cap), which is lifted to an expression.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.fx import Node

from sptc.ir import expression
from sptc.ir.region import LossRegion, Projection, Refusal
from sptc.passes.find.counted import LOSSES
from sptc.passes.graph.boundary import breach
from sptc.passes.graph.effects import written_by
from sptc.passes.graph.pattern import (
    VIEWS,
    argument,
    base_name,
    dtype,
    is_weight,
    match_adapters,
    match_projection,
    op,
    requires_grad,
    same_size,
    shape,
    transparent,
    under_views,
    value,
)
from sptc.passes.graph.rows import Rows, UnreadableRows
from sptc.passes.graph.site import called, site_of
from sptc.passes.mask.mask import Refused

_U0 = expression.U0
_MEAN = 1  # ATen's reductions: none, mean, sum
_PARTS = frozenset({"aten.slice.Tensor", "aten.select.int", "aten.transpose.int", "aten.permute.default", "aten.detach.default"})
_PRODUCTS = frozenset({"aten.linear.default", "aten.addmm.default", "aten.matmul.default", "aten.mm.default"})
_LOG_SOFTMAX = frozenset({"aten.log_softmax.int", "aten._log_softmax.default"})


def find_loss(gm: fx.GraphModule, returns: bool = True) -> tuple[tuple[LossRegion, ...], tuple[Refusal, ...]]:
    """The loss regions of one graph, and a refusal for every other cross entropy in it.

    `returns`: what the graph returns leaves it, and is not a value that a graph around it goes on with.
    """
    regions: list[LossRegion] = []
    refusals: list[Refusal] = []
    for loss in gm.graph.nodes:
        if op(loss) in LOSSES:
            try:
                regions.append(_region(loss, returns))
            except Refused as why:
                refusals.append(Refusal("loss", why.rule, why.node, str(why), site_of([loss])))
    return tuple(regions), tuple(refusals)


@dataclass(frozen=True)
class _Way:
    """What stands between a projection and the loss."""

    projection: Projection
    bias: Node | None
    logits: Node  # of both
    mapped: tuple[Node, ...]  # computed of each logit alone, last first
    rows: Rows
    nodes: frozenset[Node]
    normalized: frozenset[Node]  # of these, a log_softmax and what stands behind it


def _region(loss: Node, returns: bool) -> LossRegion:
    labels, ignored, mean, smoothing = _arguments(loss)
    known = [*loss.graph.find_nodes(op="placeholder"), labels]
    try:
        way = _way_back(loss, Rows(known))
    except UnreadableRows as reason:
        raise Refused("rows", loss, str(reason)) from None
    nodes = way.nodes | way.projection.nodes | {loss}
    leaving, readers = _leaving(nodes, way.normalized, loss) if returns else (frozenset(), frozenset())
    if found := breach(nodes, loss, leaving | readers, casts=True):
        raise Refused(found.rule, found.node, found.reason)
    (output,) = loss.graph.find_nodes(op="output")
    returned = [n for n in nodes | leaving if n is not loss and output in n.users]
    weight, side = way.projection.weight, 1 if way.projection.transposed else 0
    classes = shape(weight)[side] if way.projection.rows is None else way.projection.rows[1] - way.projection.rows[0]
    if not isinstance(classes, int):
        raise Refused("between", loss, "the number of classes is no constant")
    return LossRegion(
        y=loss,
        projection=way.projection,
        bias=way.bias,
        transform=expression.canonical(_transform(way.mapped)),
        logits=way.logits,
        mapped=way.mapped,
        labels=labels,
        undo=tuple(way.rows.steps),
        ignored=ignored,
        mean=mean,
        smoothing=smoothing,
        returned=tuple(sorted(returned)),
        readers=tuple(sorted(readers)),
        classes=classes,
        product=_product_dtype(way.projection),
        nodes=nodes | frozenset(leaving) - {output},
        site=site_of(nodes),
    )


def _arguments(loss: Node) -> tuple[Node, int, bool, float]:
    """Labels, the one that is ignored, whether the loss is a mean, and its label smoothing."""
    logits, labels, reduction = loss.args[0], loss.args[1], argument(loss, 3, "reduction", _MEAN)
    ignored, smoothing = argument(loss, 4, "ignore_index", -100), argument(loss, 5, "label_smoothing", 0.0)
    kind = dtype(labels)
    if not isinstance(logits, Node) or not isinstance(labels, Node) or kind is None or kind.is_floating_point:
        raise Refused("labels", loss, "the target of the loss holds probabilities, not labels")
    if len(shape(logits)) != len(shape(labels)) + 1 or not shape(labels):
        raise Refused("labels", loss, "the loss is of a single label")
    if argument(loss, 2, "weight") is not None:
        raise Refused("weights", loss, "the loss weighs classes, which no form of it does")
    if reduction == 0 or isinstance(value(loss), tuple):
        raise Refused("reduction", loss, "the loss is one number a label (reduction='none'): what is made of them is not known here")
    if not isinstance(ignored, int) or not isinstance(smoothing, (int, float)):
        raise Refused("labels", loss, "ignore_index or label_smoothing of the loss is no constant")
    return labels, ignored, reduction == _MEAN, float(smoothing)


def _way_back(loss: Node, rows: Rows) -> _Way:
    """From the loss's input to the projection.

    Raises:
        Refused: there is none, or something in between is neither a move of rows nor computed of each logit alone.
        UnreadableRows: rows are moved in a way that can't be undone.
    """
    node: Node = loss.args[0]  # type: ignore[assignment]
    normalized = op(loss) == "aten.cross_entropy_loss.default"
    nodes: set[Node] = set()
    normal: frozenset[Node] = frozenset()
    mapped: list[Node] = []
    bias = biased = None
    while True:
        axis = rows.axis
        if axis == len(shape(node)) - 1 and (projection := match_projection(node)) is not None:
            if not normalized:
                raise Refused("between", loss, f"the loss reads logits of {called(node)} that no log_softmax normalized")
            if bias is not None and projection.bias is not None:
                raise Refused("between", node, f"{called(node)} is a projection with a bias to which another one is added")
            return _Way(projection, bias or projection.bias, under_views(biased or node), tuple(mapped), rows, frozenset(nodes), normal)
        if (several := match_adapters(node)) is not None:
            raise Refused("adapters", node, f"{called(node)} is a projection with {len(several[1])} active adapters; a region has one")
        source = node.args[0] if node.op == "call_function" and node.args else None
        if node.op == "placeholder":
            raise Refused("projection", node, f"its logits are an input of the graph, {called(node)}: what projects them is in another one")
        if not isinstance(source, Node) or not shape(source):
            raise Refused("projection", node, f"its logits come from {called(node)} ({op(node) or node.op}), which is no projection")
        if op(node) in _LOG_SOFTMAX and int(node.args[1]) % len(shape(node)) == axis and not mapped:  # type: ignore[call-overload]
            normalized, normal = True, frozenset({*nodes, node})
        elif normalized and bias is None and (added := _class_bias(node, axis)) is not None:
            source, bias = added
            biased = node
        elif expression.liftable(op(node)) and not transparent(node) and len(node.all_input_nodes) == 1:
            if bias is not None:
                raise Refused("between", node, f"{called(node)} ({op(node)}) stands between the projection and its bias")
            mapped.append(node)
        elif not transparent(node) and (not rows.back(node) or not same_size(shape(source)[rows.axis], shape(node)[axis])):
            raise Refused("between", node, f"{called(node)} ({op(node) or node.op}) stands between the projection and the loss")
        nodes.add(node)
        node = source


def _class_bias(node: Node, axis: int) -> tuple[Node, Node] | None:
    """Logits and what a sum adds to those of each class, in whatever row: an input of the graph, or computed from parameters."""
    if base_name(node) != "aten.add.Tensor" or node.kwargs or not all(isinstance(arg, Node) for arg in node.args):
        return None
    for logits, bias in (node.args, reversed(node.args)):
        sizes = shape(bias)
        if len(shape(logits)) != len(shape(node)) or not sizes or axis != len(shape(node)) - 1 or not is_weight(bias):  # type: ignore[arg-type]
            continue
        if same_size(sizes[-1], shape(node)[axis]) and all(same_size(size, 1) for size in sizes[:-1]):
            return logits, bias  # type: ignore[return-value]
    return None


def _transform(mapped: tuple[Node, ...]) -> sympy.Expr:
    """What nodes, the last one first, compute of a logit."""
    computed: sympy.Expr = _U0
    for node in reversed(mapped):
        arguments = [computed if isinstance(arg, Node) else arg for arg in node.args]
        lifted = expression.lift(op(node), arguments, dict(node.kwargs))
        if lifted is None:
            raise Refused("between", node, f"{called(node)} ({op(node)}) has arguments that no elementwise expression covers")
        computed = lifted
    if not computed.has(_U0):
        raise Refused("between", mapped[0], f"the loss reads the same number for every logit, {computed}, and nothing of a projection")
    return computed


def _product_dtype(projection: Projection) -> torch.dtype:
    """What the product with the weight is computed in: adapters and casts may change it afterwards."""
    products = [n for n in projection.nodes if op(n) in _PRODUCTS and projection.weight in {*n.all_input_nodes, *_turned(n)}]
    kind = dtype(products[0])
    assert kind is not None
    return kind


def needed(region: LossRegion) -> tuple[bool, ...]:
    """Which gradients are asked for: of x, the weight, the bias, the adapter's low-rank input, and its B."""
    lora = region.projection.lora
    operands = (region.projection.x, region.projection.weight, region.bias, lora and lora.low, lora and lora.b)
    return tuple(operand is not None and requires_grad(operand) for operand in operands)


def _turned(product: Node) -> Iterator[Node]:
    """What the operands of a product are transpositions of."""
    for operand in product.all_input_nodes:
        yield from operand.all_input_nodes


def _leaving(nodes: frozenset[Node], normalized: frozenset[Node], loss: Node) -> tuple[frozenset[Node], frozenset[Node]]:
    """What may use a region's nodes from outside: the graph's output, with views, casts and parts before it; and readers, as an accuracy
    is: what reads logits that are not normalized, and gives them no gradient.
    """
    (output,) = loss.graph.find_nodes(op="output")
    found: set[Node] = set()
    readers: set[Node] = set()
    start = [(user, node not in normalized) for node in nodes if node is not loss for user in node.users]
    pending = [(user, plain) for user, plain in start if user not in nodes and user is not output]
    order = {node: place for place, node in enumerate(loss.graph.nodes)}
    reached: set[Node] = set()
    while pending:
        node, plain = pending.pop()
        if node in reached:
            continue
        if _shows(node):
            reached.add(node)
            pending += [(user, plain) for user in node.users if user is not output]
        elif plain and not written_by(node) and not any(requires_grad(n) for n in (node, *_parts(node))):
            readers.add(node)
    for node in sorted(reached, key=order.__getitem__, reverse=True):
        if all(user is output or user in found or user in readers for user in node.users):
            found.add(node)
    return frozenset({*found, output}), frozenset(readers)


def _parts(node: Node) -> list[Node]:
    """What is used of several results."""
    return [user for user in node.users if user.target is operator.getitem]


def _shows(node: Node) -> bool:
    """Whether a node is its first argument in another shape or dtype, or a part of it."""
    return transparent(node) or op(node) in VIEWS or op(node) in _PARTS
