"""An FFN region over some blocks of its hidden units for each token, as a router chooses them: the paper's routed FFN, in plain ATen."""

from __future__ import annotations

import torch
from torch.fx import Node

from sptc.ir.region import FfnRegion, FfnSettings, RouterState
from sptc.paper.fit import STAND_IN_SCALING
from sptc.passes.graph.build import Builder, aten
from sptc.passes.graph.pattern import dtype, shape
from sptc.passes.rewrite.write_ffn import Ffn, Part

ops = torch.ops.sptc


def rewrite_blocks(region: FfnRegion, settings: FfnSettings, state: RouterState | None, keep: Node | None = None) -> Node:
    """Insert the routed FFN before `region.y`; returns the node that replaces it. `keep` is bool [N], of the region's graph."""
    b = Builder(region.y)
    x = b.rows(region.x)
    scores, added = _trained_scores(b, x, state) if state is not None else (_scores_by_weights(b, region, x, settings), None)
    part = _Blocks(b, x, settings, b.call(ops.route.default, scores, settings.active, keep), added, keep is not None)
    y = Ffn(region, part).output()
    if state is not None and settings.active < settings.blocks:
        y = b.call(aten.add.Tensor, y, _stand_in(b, x, state, part.share))
    return b.cast(b.like_rows_of(y, region.x, region.y), dtype(region.y))


class _Blocks(Part):
    """The blocks of each token. Rows are the entries of the router's lists, in the order of blocks: so shapes do not depend on data.

    `added` [N, G]: what training has added to the router; blocks are scaled by it where a token leaves some out. `uneven`: tokens use
    different numbers of blocks.
    """

    def __init__(self, b: Builder, x: Node, settings: FfnSettings, lists: Node, added: Node | None, uneven: bool) -> None:
        super().__init__(b)
        self._x, self._settings = x, settings
        self._entries, self._blocks, self._offsets = (b.item(lists, i) for i in range(3))
        self._scale = None
        if added is not None and settings.active < settings.blocks:
            scale = b.call(aten.mul.Tensor, b.call(aten.sigmoid.default, added), 2.0)
            self._scale = b.call(aten.unsqueeze.default, b.call(aten.index.Tensor, scale, [self._entries, self._blocks]), 1)
        self.share: Node | float = self._used() if uneven else settings.density

    def enter(self, x: Node, weight: Node, bias: Node | None = None) -> Node:
        u = self.b.call(ops.gather_product.default, x, self._by_blocks(weight), self._entries, self._offsets)
        if bias is None:
            return u
        of_block = self.b.call(aten.index_select.default, self.b.cast(self._by_blocks(bias), dtype(u)), 0, self._blocks)
        return self.b.call(aten.add.Tensor, u, of_block)

    def leave(self, hidden: Node, weight: Node, bias: Node | None = None) -> Node:
        weight = self._by_blocks(self.b.call(aten.t.default, weight))
        y = self.b.call(ops.scatter_product.default, hidden, weight, self._entries, self._offsets, self.b.size(self._x, 0))
        return y if bias is None else self.b.call(aten.add.Tensor, y, self.b.cast(bias, dtype(y)))

    def weighed(self, hidden: Node) -> Node:
        if self._scale is None:
            return hidden
        scaled = self.b.recomputed(self.b.call(aten.mul.Tensor, hidden, self._scale))
        return scaled if dtype(scaled) == dtype(hidden) else self.b.recomputed(self.b.cast(scaled, dtype(hidden)))

    def whole(self, low: Node) -> Node:
        """Divided by the share of its blocks that a token uses, as what dropout keeps is, so that an adapter moves the output as far, and
        learns as fast, as in the dense FFN."""
        if self.share == 1.0:
            return low
        return self.b.cast(self.b.call(aten.div.Tensor, low, self.share), dtype(low))

    def _by_blocks(self, operand: Node) -> Node:
        """[units, ...] as [G, units of a block, ...]."""
        return self.b.call(aten.unflatten.int, operand, 0, [self._settings.blocks, int(shape(operand)[0]) // self._settings.blocks])

    def _used(self) -> Node:
        """The share of its blocks that each token uses, fp32 [N, 1]."""
        ones = self.b.call(aten.ones_like.default, self._entries, dtype=torch.float32)
        none = self.b.call(aten.new_zeros.default, ones, [self.b.size(self._x, 0)])
        counts = self.b.call(aten.index_add.default, none, 0, self._entries, ones)
        return self.b.call(aten.unsqueeze.default, self.b.call(aten.div.Tensor, counts, self._settings.blocks), 1)


def _trained_scores(b: Builder, x: Node, state: RouterState) -> tuple[Node, Node]:
    """Scores [N, G] that choose, and the part of them that training has added, which scales (`sptc.paper.state.Router`).

    The paper (section 3) scales by 2 sigmoid of the whole logit, without a start: for the few tokens of great norm, whose logits are
    great, that doubled the FFN's output.
    """
    start = b.call(aten.detach.default, b.single(_linear(b, x, state.start_weight, state.start_bias)))
    added = b.single(_linear(b, x, state.weight, state.bias))
    return b.call(aten.add.Tensor, start, added), added


def _scores_by_weights(b: Builder, region: FfnRegion, x: Node, settings: FfnSettings) -> Node:
    """Without trained state: a block's score is x times the mean of its rows of the first up projection; it does not scale."""
    up = region.ups[0]
    weight = Part(b).units(up.weight, 1 if up.transposed else 0, up.rows)
    weight = b.call(aten.detach.default, b.call(aten.t.default, weight) if up.transposed else weight)
    blocks = b.call(aten.unflatten.int, weight, 0, [settings.blocks, region.hidden // settings.blocks])
    return b.single(b.call(aten.linear.default, b.call(aten.detach.default, x), b.call(aten.mean.dim, blocks, [1])))


def _stand_in(b: Builder, x: Node, state: RouterState, used: Node | float) -> Node:
    """What stands in for the blocks that a token leaves out, [N, d_out]: a low-rank linear map of x, times twice their share."""
    y = _linear(b, _linear(b, x, state.low), state.high, state.constant)
    if isinstance(used, float):
        return b.call(aten.mul.Tensor, y, STAND_IN_SCALING * (1.0 - used))
    share = b.call(aten.mul.Tensor, b.call(aten.rsub.Scalar, used, 1.0), STAND_IN_SCALING)
    return b.call(aten.mul.Tensor, y, b.cast(share, dtype(y)))


def _linear(b: Builder, x: Node, weight: Node, bias: Node | None = None) -> Node:
    return b.call(aten.linear.default, x, b.cast(weight, dtype(x)), None if bias is None else b.cast(bias, dtype(x)))
