"""The loss as one operator that never holds its logits: labels are brought back to the rows of what is projected."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from sptc.ir.region import LossRegion, LossSettings
from sptc.passes.find.loss import needed
from sptc.passes.graph.insert import as_rows, cast, insert
from sptc.passes.graph.pattern import dtype
from sptc.passes.graph.rows import brought_back, sized


def rewrite_loss(region: LossRegion, settings: LossSettings) -> Node:
    """Insert the operator before `region.y`; returns the node that replaces it."""
    projection = region.projection
    lora = projection.lora
    named = (projection.x, projection.weight, region.bias, region.labels, *(() if lora is None else (lora.low, lora.b, lora.scaling)))
    read = {node: node for node in (*named, *sized(region.undo)) if isinstance(node, Node)}
    result: Node = insert(region.y, partial(_loss, region, settings), read)
    return result


def _loss(region: LossRegion, settings: LossSettings, t: Mapping[Node, Any]) -> Tensor:
    """The loss, a number, from the tensors of the region's operands."""
    projection, to, lora = region.projection, region.product, region.projection.lora

    def of_classes(operand: Tensor) -> Tensor:
        """Of a weight or bias, [out, ...], what belongs to the classes."""
        return operand if projection.rows is None else torch.ops.aten.slice(operand, 0, *projection.rows)

    weight, bias, low, up = t[projection.weight], None, None, None
    if region.bias is not None:
        bias = t[region.bias]
        bias = bias.reshape(-1) if bias.dim() > 1 else bias
        bias = cast(bias if bias.shape[0] == region.classes else of_classes(bias), to)
    if lora is not None:
        low, up = t[lora.low], of_classes(t[lora.b])
        if lora.scaling != 1.0:
            low = low * (t[lora.scaling] if isinstance(lora.scaling, Node) else lora.scaling)
        low = as_rows(low)
        up = cast(up, low.dtype)
    labels = cast(brought_back(t[region.labels], region.undo, region.ignored, t), torch.int64)
    loss: Tensor = torch.ops.sptc.linear_cross_entropy(
        *(cast(as_rows(t[projection.x]), to), cast(of_classes(weight.t() if projection.transposed else weight), to), bias, low, up, labels),
        *(region.ignored, region.mean, region.smoothing, region.transform, settings.rows, list(needed(region))),
    )[0]
    return cast(loss, dtype(region.y))


def drop_returned(graph: fx.Graph, logits: tuple[Node, ...]) -> tuple[int, ...]:
    """Let the graph return None in place of `logits`; returns which of its results these are."""
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    dropped = tuple(i for i, result in enumerate(results) if result in logits)
    output.args = (type(results)(None if i in dropped else result for i, result in enumerate(results)),)
    return dropped
