"""An FFN region over some blocks of its hidden units for each token, as a router chooses them: the paper's routed FFN, in plain ATen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from sptc.ir.region import FfnRegion, FfnSettings, RouterState
from sptc.paper.fit import STAND_IN_SCALING
from sptc.passes.graph.insert import as_rows, cast, recomputed
from sptc.passes.rewrite.write_ffn import Ffn, Part, Tensors, insert_ffn

ops = torch.ops.sptc


def rewrite_blocks(region: FfnRegion, settings: FfnSettings, state: RouterState | None, keep: Node | None = None) -> Node:
    """Insert the routed FFN before `region.y`; returns the node that replaces it. `keep` is bool [N], of the region's graph."""
    return insert_ffn(region, _routed, settings, state, operands=(keep,))


def _routed(region: FfnRegion, settings: FfnSettings, state: RouterState | None, t: Tensors, keep: Tensor | None) -> Tensor:
    """Outputs [N, d_out]. `keep`, bool [N]: tokens that get more blocks than others; None: all are alike."""
    x = as_rows(t[region.x])
    scores, added = _trained_scores(t, x, state) if state is not None else (_scores_by_weights(region, t, x, settings), None)
    part = _Blocks(x, settings, ops.route(scores, settings.active, keep), added, keep is not None)
    y = Ffn(region, t, part).output()
    if state is not None and settings.active < settings.blocks:
        y = y + _stand_in(t, x, state, part.share)
    return y


class _Blocks(Part):
    """The blocks of each token. Rows are the entries of the router's lists, in the order of blocks: so shapes do not depend on data.

    `added` [N, G]: what training has added to the router; blocks are scaled by it where a token leaves some out. `uneven`: tokens use
    different numbers of blocks.
    """

    def __init__(self, x: Tensor, settings: FfnSettings, lists: tuple[Tensor, ...], added: Tensor | None, uneven: bool) -> None:
        self._x, self._settings = x, settings
        self._entries, self._blocks, self._offsets = lists
        self._scale = None
        if added is not None and settings.active < settings.blocks:
            self._scale = (added.sigmoid() * 2.0)[self._entries, self._blocks].unsqueeze(1)
        self.share: Tensor | float = self._used() if uneven else settings.density

    def enter(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        u: Tensor = ops.gather_product(x, self._by_blocks(weight), self._entries, self._offsets)
        return u if bias is None else u + cast(self._by_blocks(bias), u.dtype).index_select(0, self._blocks)

    def leave(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = ops.scatter_product(hidden, self._by_blocks(weight.t()), self._entries, self._offsets, self._x.shape[0])
        return y if bias is None else y + cast(bias, y.dtype)

    def weighed(self, hidden: Tensor) -> Tensor:
        if self._scale is None:
            return hidden
        return recomputed(cast(recomputed(hidden * self._scale), hidden.dtype))

    def whole(self, low: Tensor) -> Tensor:
        """Divided by the share of its blocks that a token uses, as what dropout keeps is, so that an adapter moves the output as far, and
        learns as fast, as in the dense FFN."""
        return low if isinstance(self.share, float) and self.share == 1.0 else cast(low / self.share, low.dtype)

    def _by_blocks(self, operand: Tensor) -> Tensor:
        """[units, ...] as [G, units of a block, ...]."""
        return operand.unflatten(0, (self._settings.blocks, int(operand.shape[0]) // self._settings.blocks))

    def _used(self) -> Tensor:
        """The share of its blocks that each token uses, fp32 [N, 1]."""
        ones = torch.ones_like(self._entries, dtype=torch.float32)
        counts = ones.new_zeros(self._x.shape[0]).index_add(0, self._entries, ones)
        return (counts / self._settings.blocks).unsqueeze(1)


def _trained_scores(t: Tensors, x: Tensor, state: RouterState) -> tuple[Tensor, Tensor]:
    """Scores [N, G] that choose, and the part of them that training has added, which scales (`sptc.paper.state.Router`).

    The paper (section 3) scales by 2 sigmoid of the whole logit, without a start: for the few tokens of great norm, whose logits are
    great, that doubled the FFN's output.
    """
    start = cast(_linear(x, t[state.start_weight], t[state.start_bias]), torch.float32).detach()
    added = cast(_linear(x, t[state.weight], t[state.bias]), torch.float32)
    return start + added, added


def _scores_by_weights(region: FfnRegion, t: Tensors, x: Tensor, settings: FfnSettings) -> Tensor:
    """Without trained state: a block's score is x times the mean of its rows of the first up projection; it does not scale."""
    up = region.ups[0]
    weight = Part().units(t[up.weight], 1 if up.transposed else 0, up.rows)
    weight = (weight.t() if up.transposed else weight).detach()
    means = weight.unflatten(0, (settings.blocks, region.hidden // settings.blocks)).mean(1)
    return cast(linear(x.detach(), means), torch.float32)


def _stand_in(t: Tensors, x: Tensor, state: RouterState, used: Tensor | float) -> Tensor:
    """What stands in for the blocks that a token leaves out, [N, d_out]: a low-rank linear map of x, times twice their share."""
    y = _linear(_linear(x, t[state.low]), t[state.high], t[state.constant])
    if isinstance(used, float):
        return y * (STAND_IN_SCALING * (1.0 - used))
    return y * cast((1.0 - used) * STAND_IN_SCALING, y.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype))
