"""An FFN region as a router in plain ATen and one `sptc::routed_ffn`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sptc.passes.build import Builder, aten
from sptc.passes.pattern import dtype, shape
from sptc.region import FfnRegion, FfnSettings, Projection, RouterState


def rewrite_ffn(region: FfnRegion, settings: FfnSettings, state: RouterState | None, keep: Node | None = None) -> Node:
    """Insert the routed FFN before `region.y`; returns the node that replaces it. `keep` is bool [N], of the region's graph."""
    b = Builder(region.y)
    x = b.rows(region.x)
    weights = [_weight(b, up) for up in region.ups]
    if state is not None:
        tokens, offsets, scale = _route_trained(b, x, settings, state, keep)
    else:
        tokens, offsets, scale = _route_by_weights(b, x, settings, weights[0], keep)
    biases = {i: _rows(b, up.bias, up.rows) for i, up in enumerate(region.ups) if up.bias is not None}
    adapters = {i: up for i, up in enumerate(region.ups) if up.lora is not None}
    down = region.down
    lora = down.lora
    out = b.call(
        torch.ops.sptc.routed_ffn.default,
        x,
        weights,
        list(biases.values()),
        list(biases),
        [_low(b, up, dtype(x)) for up in adapters.values()],
        [_adapter_b(b, up, dtype(x)) for up in adapters.values()],
        list(adapters),
        down.weight if down.transposed else b.call(aten.t.default, down.weight),
        b.cast(lora.a, dtype(x)) if lora is not None else None,
        tokens,
        offsets,
        scale,
        b.seed() if region.dropout_p else None,
        b.seed() if lora is not None and lora.dropout_p else None,
        region.dropout_p,
        lora.dropout_p if lora is not None else 0.0,
        region.activation,
    )
    y = b.item(out, 0)
    if down.bias is not None:
        y = b.call(aten.add.Tensor, y, down.bias)
    if lora is not None:
        low_out = b.cast(b.item(out, 1), dtype(lora.b))
        y = b.call(aten.add.Tensor, y, b.call(aten.mul.Tensor, b.call(aten.linear.default, low_out, lora.b), lora.scaling))
    return b.cast(b.like_rows_of(y, region.x, region.y), dtype(region.y))


def _route_trained(b: Builder, x: Node, settings: FfnSettings, state: RouterState, keep: Node | None) -> tuple[Node, Node, Node | None]:
    """The paper's router: sigmoid scores choose the blocks and scale them (section 3), without its balance loss."""
    p = _scores(b, x, state)
    lists = b.call(torch.ops.sptc.route.default, p, settings.active, keep)
    tokens, offsets, index = (b.item(lists, i) for i in range(3))
    if settings.active == settings.blocks:
        return tokens, offsets, None
    doubled = b.call(aten.mul.Tensor, p, 2.0)
    scale = b.call(aten.index_select.default, b.call(aten.reshape.default, doubled, [-1]), 0, index)
    return tokens, offsets, scale


def _scores(b: Builder, x: Node, state: RouterState) -> Node:
    logits = b.call(aten.linear.default, x, b.cast(state.weight, dtype(x)), b.cast(state.bias, dtype(x)))
    return b.call(aten.sigmoid.default, b.single(logits))


def _route_by_weights(b: Builder, x: Node, settings: FfnSettings, up: Node, keep: Node | None) -> tuple[Node, Node, None]:
    """Without trained state: a block's score is x times the mean of its rows of the first up projection; it does not scale."""
    rows = int(shape(up)[0])
    blocks = b.call(aten.unflatten.int, b.call(aten.detach.default, up), 0, [settings.blocks, rows // settings.blocks])
    router = b.call(aten.mean.dim, blocks, [1])
    scores = b.call(aten.linear.default, b.call(aten.detach.default, x), router)
    lists = b.call(torch.ops.sptc.route.default, b.single(scores), settings.active, keep)
    return b.item(lists, 0), b.item(lists, 1), None


def _weight(b: Builder, up: Projection) -> Node:
    """The up projection as [d_ff, d], a view of the parameter."""
    weight = b.call(aten.t.default, up.weight) if up.transposed else up.weight
    return _rows(b, weight, up.rows)


def _rows(b: Builder, node: Any, rows: tuple[int, int] | None) -> Node:
    return node if rows is None else b.call(aten.slice.Tensor, node, 0, rows[0], rows[1])


def _low(b: Builder, up: Projection, to: torch.dtype | None) -> Node:
    """x A^T of the adapter with its scaling, [N, r]; dropout is part of `low` already."""
    assert up.lora is not None
    low = b.rows(up.lora.low)
    if up.lora.scaling != 1.0:
        low = b.call(aten.mul.Tensor, low, up.lora.scaling)
    return b.cast(low, to)


def _adapter_b(b: Builder, up: Projection, to: torch.dtype | None) -> Node:
    assert up.lora is not None
    return b.cast(_rows(b, up.lora.b, up.rows), to)
