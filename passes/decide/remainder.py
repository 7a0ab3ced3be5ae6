"""What a graph costs outside its regions: the part of a step that no density makes faster.

Products at the rate of products; everything else by the bytes that it moves, pointwise operators fused with what uses them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from sptc.device.costs import DeviceCosts
from sptc.ir.hint import optimization_hint
from sptc.passes.graph.frame import graphs
from sptc.passes.graph.pattern import base_name, dtype, op, requires_grad, shape, value
from sptc.passes.unit import Unit

# Positions of the two factors.
_PRODUCTS = {
    "aten.linear.default": (0, 1),
    "aten.addmm.default": (1, 2),
    "aten.mm.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.baddbmm.default": (1, 2),
    "aten.matmul.default": (0, 1),
}
_ATTENTION = "aten.scaled_dot_product_attention.default"
_EXPONENTIALS = frozenset(
    {"aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default", "aten.cross_entropy_loss.default"}
)


def remainder_seconds(unit: Unit) -> float:
    """Seconds of forward and backward of all nodes of `unit` that belong to no region, at the sizes of the example; no optimizer.

    The backward of a product counts a product for each factor that has a gradient, that of any other operator counts as its forward.
    """
    inside = {node for region in unit.regions for node in region.nodes}
    device: DeviceCosts = unit.device
    return sum(_seconds(node, device) for gm in graphs(unit.gm) for node in gm.graph.nodes if op(node) and node not in inside)


def _seconds(node: Node, device: DeviceCosts) -> float:
    out = value(node)
    if not isinstance(out, torch.Tensor) and not isinstance(out, (tuple, list)):
        return 0.0
    factors = _PRODUCTS.get(base_name(node))
    if factors is not None:
        a, b = (node.args[i] for i in factors)
        flops = 2 * _elements(node) * _hint(shape(a)[-1])
        backward = sum(requires_grad(x) for x in (a, b) if isinstance(x, Node)) if requires_grad(node) else 0
        return flops * (1 + backward) / device.rates(dtype(node)).gemm + (1 + backward) * device.op_seconds
    times = 2 if requires_grad(node) else 1
    if op(node) == _ATTENTION:
        q, k = node.args[:2]
        rates, flops = device.rates(dtype(node)), 4 * _elements(q) * _hint(shape(k)[-2])
        return flops / rates.attention + (times - 1) * 2.5 * flops / rates.attention_backward
    traffic = _traffic(node)
    if not traffic:
        return 0.0
    exponentials = _elements(node.args[0]) / device.exponentials if op(node) in _EXPONENTIALS else 0.0
    return times * (traffic / device.bandwidth + exponentials + device.op_seconds)


def _traffic(node: Node) -> float:
    """Bytes that a forward moves: none for views, and none for a pointwise operator that only pointwise ones use."""
    target: Any = node.target
    if any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns):
        return 0.0
    if torch.Tag.pointwise not in target.tags:
        return _bytes(node) + sum(map(_bytes, node.all_input_nodes))
    fused = all(isinstance(u.target, torch._ops.OpOverload) and torch.Tag.pointwise in u.target.tags for u in node.users)
    return 0.0 if fused else 2 * _bytes(node)


def _bytes(node: Node) -> float:
    out = value(node)
    tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
    return sum(_hint(math.prod(t.shape)) * t.dtype.itemsize for t in tensors)


def _elements(node: Any) -> int:
    return _hint(math.prod(shape(node)))


def _hint(size: Any) -> int:
    return int(optimization_hint(size))
