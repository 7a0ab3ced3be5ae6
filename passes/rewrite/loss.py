"""The loss as one operator that never holds its logits: labels are brought back to the rows of what is projected."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import Node

from sptc.ir.region import LossRegion, LossSettings
from sptc.passes.find.loss import needed
from sptc.passes.graph.build import Builder, aten
from sptc.passes.graph.pattern import dtype, shape
from sptc.passes.graph.rows import brought_back


def rewrite_loss(region: LossRegion, settings: LossSettings) -> Node:
    """Insert the operator before `region.y`; returns the node that replaces it."""
    b, projection, to = Builder(region.y), region.projection, region.product

    def of_classes(operand: Node) -> Node:
        """Of a weight or bias, [out, ...], what belongs to the classes."""
        return operand if projection.rows is None else b.call(aten.slice.Tensor, operand, 0, *projection.rows)

    weight = b.call(aten.t.default, projection.weight) if projection.transposed else projection.weight
    bias = region.bias
    if bias is not None:
        bias = b.call(aten.reshape.default, bias, [-1]) if len(shape(bias)) > 1 else bias
        bias = b.cast(bias if shape(bias)[0] == region.classes else of_classes(bias), to)
    low, up = None, None
    if projection.lora is not None:
        low, up = projection.lora.low, of_classes(projection.lora.b)
        low = b.rows(low if projection.lora.scaling == 1.0 else b.call(aten.mul.Tensor, low, projection.lora.scaling))
        up = b.cast(up, dtype(low))
    labels = b.cast(brought_back(b, region.labels, region.undo, region.ignored), torch.int64)
    outcome = b.call(
        torch.ops.sptc.linear_cross_entropy.default,
        *(b.cast(b.rows(projection.x), to), b.cast(of_classes(weight), to), bias, low, up, labels),
        *(region.ignored, region.mean, region.smoothing, region.transform, settings.rows, list(needed(region))),
    )
    return b.cast(b.item(outcome, 0), dtype(region.y))


def drop_returned(graph: fx.Graph, logits: tuple[Node, ...]) -> tuple[int, ...]:
    """Let the graph return None in place of `logits`; returns which of its results these are."""
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    dropped = tuple(i for i, result in enumerate(results) if result in logits)
    output.args = (type(results)(None if i in dropped else result for i, result in enumerate(results)),)
    return dropped
