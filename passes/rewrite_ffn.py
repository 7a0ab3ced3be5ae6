"""An FFN region as a router in plain ATen and one `sptc::routed_ffn`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sptc.fit import STAND_IN_SCALING
from sptc.passes.build import Builder, aten
from sptc.passes.pattern import dtype, shape
from sptc.region import FfnRegion, FfnSettings, Lora, Projection, RouterState


def rewrite_ffn(region: FfnRegion, settings: FfnSettings, state: RouterState | None, keep: Node | None = None) -> Node:
    """Insert the routed FFN before `region.y`; returns the node that replaces it. `keep` is bool [N], of the region's graph."""
    b = Builder(region.y)
    x = b.rows(region.x)
    weights = [_weight(b, up) for up in region.ups]
    scale: Node | None
    if state is not None:
        tokens, offsets, scale = _route_trained(b, x, settings, state, keep)
    else:
        tokens, offsets, scale = _route_by_weights(b, x, settings, weights[0], keep)
    used = settings.density if keep is None else _used(b, x, settings, tokens)
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
    if state is not None and settings.active < settings.blocks:
        y = b.call(aten.add.Tensor, y, _stand_in(b, x, state, used))
    if down.bias is not None:
        y = b.call(aten.add.Tensor, y, down.bias)
    if lora is not None:
        y = b.call(aten.add.Tensor, y, _adapter_output(b, b.item(out, 1), lora, used))
    return b.cast(b.like_rows_of(y, region.x, region.y), dtype(region.y))


def _used(b: Builder, x: Node, settings: FfnSettings, tokens: Node) -> Node:
    """The share of its blocks that each token uses, fp32 [N, 1], where tokens differ in it."""
    ones = b.call(aten.ones_like.default, tokens, dtype=torch.float32)
    counts = b.call(aten.index_add.default, b.call(aten.new_zeros.default, ones, [b.size(x, 0)]), 0, tokens, ones)
    return b.call(aten.unsqueeze.default, b.call(aten.div.Tensor, counts, settings.blocks), 1)


def _adapter_output(b: Builder, low: Node, lora: Lora, used: Node | float) -> Node:
    """What the adapter of the down projection adds, from `low` [N, r], its sum over the hidden units that a token uses.

    Divided by their share, as what dropout keeps is, the sum is as large as over all units, so that an adapter moves the output as far, and
    learns as fast, as in the dense FFN.
    """
    scaled = b.call(aten.mul.Tensor, low, lora.scaling)
    if used != 1.0:
        scaled = b.call(aten.div.Tensor, scaled, used)
    return b.call(aten.linear.default, b.cast(scaled, dtype(lora.b)), lora.b)


def _route_trained(b: Builder, x: Node, settings: FfnSettings, state: RouterState, keep: Node | None) -> tuple[Node, Node, Node | None]:
    """Tokens and offsets of the lists, and the scale of each entry: None where all blocks are active, which is the dense FFN.

    A block is chosen by all of its logit and scaled by what training has added to it (`sptc.state.Router`). The paper (section 3) scales by
    2 sigmoid of the whole logit, without a start: for the few tokens of great norm, whose logits are great, that doubled the FFN's output.
    """
    start = b.call(aten.detach.default, b.single(_linear(b, x, state.start_weight, state.start_bias)))
    added = b.single(_linear(b, x, state.weight, state.bias))
    lists = b.call(torch.ops.sptc.route.default, b.call(aten.add.Tensor, start, added), settings.active, keep)
    tokens, offsets, index = (b.item(lists, i) for i in range(3))
    if settings.active == settings.blocks:
        return tokens, offsets, None
    scale = b.call(aten.mul.Tensor, b.call(aten.sigmoid.default, added), 2.0)
    return tokens, offsets, b.call(aten.index_select.default, b.call(aten.reshape.default, scale, [-1]), 0, index)


def _stand_in(b: Builder, x: Node, state: RouterState, used: Node | float) -> Node:
    """What stands in for the blocks that a token leaves out, [N, d_out]: a low-rank linear map of x, times twice their share."""
    y = _linear(b, _linear(b, x, state.low), state.high, state.constant)
    if isinstance(used, float):
        return b.call(aten.mul.Tensor, y, STAND_IN_SCALING * (1.0 - used))
    share = b.call(aten.mul.Tensor, b.call(aten.rsub.Scalar, used, 1.0), STAND_IN_SCALING)
    return b.call(aten.mul.Tensor, y, b.cast(share, dtype(y)))


def _linear(b: Builder, x: Node, weight: Node, bias: Node | None = None) -> Node:
    return b.call(aten.linear.default, x, b.cast(weight, dtype(x)), None if bias is None else b.cast(bias, dtype(x)))


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
