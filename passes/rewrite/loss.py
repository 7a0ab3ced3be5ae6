"""The loss as one operator that never holds its logits: labels are brought back to the rows of what is projected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from sptc.ir import expression
from sptc.ir.region import Deferral, LossRegion, LossSettings
from sptc.passes.find.loss import needed
from sptc.passes.find.returned import results_of, source_of
from sptc.passes.graph.insert import as_rows, cast, insert
from sptc.passes.graph.modes import autocast_like
from sptc.passes.graph.pattern import dtype, value
from sptc.passes.graph.rows import brought_back, sized
from sptc.passes.unit import Unit


@dataclass(frozen=True)
class Operands:
    """What logits are computed from, and their labels."""

    x: Tensor  # [N, d]
    weight: Tensor  # [classes, d]
    bias: Tensor | None  # [classes]
    low: Tensor | None  # [N, r], an adapter's low-rank input, scaled
    up: Tensor | None  # [classes, r], its B
    labels: Tensor  # int64 [N], the region's `ignored` where a row has no logits
    transform: str  # of logits, as the region's

    def logits(self, rows: Tensor) -> Tensor:
        """Of some rows alone, int64 [n]: [n, classes], in fp32, or fp64 for fp64."""
        part = self.x[rows] @ self.weight.t()
        if self.bias is not None:
            part += self.bias
        part = part if part.dtype == torch.float64 else part.float()
        if self.low is not None and self.up is not None:
            part += self.low[rows].to(part.dtype) @ self.up.t().to(part.dtype)
        return expression.evaluate(expression.parse(self.transform), part)


def rewrite_loss(region: LossRegion, settings: LossSettings) -> tuple[Node, Node]:
    """Insert the operator before `region.y`; returns the node that replaces it, and the handle of logits that are returned besides."""
    logits = region.logits if settings.given else None
    result: tuple[Node, Node] = insert(region.y, partial(_loss, region, settings), {node: node for node in operands_of(region)}, logits)
    return result


def operands_of(region: LossRegion) -> list[Node]:
    """The nodes whose values `operands` reads."""
    projection, lora = region.projection, region.projection.lora
    named = (projection.x, projection.weight, region.bias, region.labels, *(() if lora is None else (lora.low, lora.b, lora.scaling)))
    return [node for node in (*named, *sized(region.undo)) if isinstance(node, Node)]


def _loss(region: LossRegion, settings: LossSettings, t: Mapping[Node, Any], logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss, a number, from the values of the region's operands, and the handle of its logits."""
    o = operands(region, t)
    loss, *_, handle = torch.ops.sptc.linear_cross_entropy(
        *(o.x, o.weight, o.bias, o.low, o.up, o.labels, None if logits is None else as_rows(logits.detach())),
        *(region.ignored, region.mean, region.smoothing, region.transform, settings.returned, settings.rows, list(needed(region))),
    )
    return cast(loss, dtype(region.y)), handle


def operands(region: LossRegion, t: Mapping[Node, Any]) -> Operands:
    """The region's operands, row by row and in the dtype of its products, from the values of `operands_of`."""
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
    rows, weight = as_rows(t[projection.x]), of_classes(weight.t() if projection.transposed else weight)
    return Operands(cast(rows, to), cast(weight, to), bias, low, up, labels, region.transform)


def drop_returned(graph: fx.Graph, logits: tuple[Node, ...]) -> tuple[int, ...]:
    """Let the graph return None in place of `logits`; returns which of its results these are."""
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    dropped = tuple(i for i, result in enumerate(results) if result in logits)
    output.args = (type(results)(None if i in dropped else result for i, result in enumerate(results)),)
    return dropped


def deferral(unit: Unit, region: LossRegion, place: int) -> Deferral:
    """How the logits that the captured graph returns at `place` are computed from the input of their projection, with autocast's casts."""
    nodes = source_of(unit, region, place)
    assert nodes is not None, "decide defers only what can be"
    (output,) = unit.gm.graph.find_nodes(op="output")
    result: Node = results_of(output)[place]
    inputs = unit.gm.graph.find_nodes(op="placeholder")
    given = [node for node in nodes if node.op == "placeholder"]
    device, fake_mode = value(result).device.type, detect_fake_mode([value(result)])
    assert fake_mode is not None

    def compute(*operands: Any) -> Any:
        computed = dict(zip((region.projection.x, *given), operands, strict=True))
        for node in nodes:
            if node not in computed:
                args, kwargs = fx.map_arg((node.args, node.kwargs), computed.__getitem__)
                with autocast_like(node, device):
                    computed[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return computed[result]

    with fake_mode, torch.no_grad():
        gm = make_fx(compute)(*map(value, (region.projection.x, *given)))  # below autocast, whose casts are nodes then
    return Deferral(gm, tuple(inputs.index(node) for node in given))
