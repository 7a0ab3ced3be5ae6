"""Rewrite the regions that were decided on into sparse operators. The operators are named, not imported: their owner registers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from sptc.ir.region import (
    AttentionRegion,
    AttentionSettings,
    CodebookState,
    Decision,
    FfnSettings,
    LossRegion,
    LossSettings,
    Region,
    RouterState,
    Settings,
    State,
    UnitSettings,
)
from sptc.passes.find.counted import fits
from sptc.passes.find.returned import large_results
from sptc.passes.graph.effects import remove_dead_code
from sptc.passes.graph.frame import Frame, drop_unused_operands, frames, hand_down
from sptc.passes.graph.insert import forget_marks
from sptc.passes.rewrite.attention import rewrite_attention
from sptc.passes.rewrite.blocks import rewrite_blocks
from sptc.passes.rewrite.gradients import rewrite_gradients
from sptc.passes.rewrite.loss import deferral, drop_returned, rewrite_loss
from sptc.passes.rewrite.returned import return_instead, set_apart
from sptc.passes.rewrite.token_lists import TokenLists, Tokens, insert_tokens
from sptc.passes.rewrite.units import rewrite_units
from sptc.passes.unit import Unit


def rewrite(unit: Unit) -> Unit:
    """Replace each decided region by its sparse operators and drop what nothing uses any more, such as an n x n mask."""
    chosen = [d for d in unit.decisions if d.rewrite]
    large = large_results(unit) if chosen else ()
    every = list(frames(unit.gm))
    by_graph = {frame.gm.graph: frame for frame in every}
    tokens = insert_tokens(unit, [d.settings for d in chosen if not isinstance(d.settings, LossSettings)])
    dropped: list[int] = []
    kept: dict[int, Node] = {}
    deferred = {
        d.settings.kept: deferral(unit, d.region, d.settings.kept)
        for d in chosen
        if isinstance(d.region, LossRegion) and isinstance(d.settings, LossSettings) and d.settings.deferred and d.settings.kept is not None
    }
    by_place = {node: place for frame in every for place, node in enumerate(frame.gm.graph.nodes)}
    # The last one first: what a region reads may be what another one computes, which is then replaced in the new form as well.
    for decision in sorted(chosen, key=lambda d: by_place[d.region.y], reverse=True):
        region, settings = decision.region, decision.settings
        if isinstance(region, LossRegion):
            assert isinstance(settings, LossSettings)
            y, handle = rewrite_loss(region, settings)
            if unit.config.loss_logits == "drop":
                dropped += drop_returned(region.y.graph, region.returned)
            elif settings.kept is not None:
                kept[settings.kept] = handle
                if settings.kept in deferred:
                    return_instead(unit.gm.graph.output_node(), settings.kept, region.projection.x)
        else:
            assert not isinstance(settings, LossSettings)
            y = sparse_form(region, settings, unit.states.get(region), by_graph, tokens)
        region.y.replace_all_uses_with(y)
    for decision in chosen:
        _erase(decision)
    for frame in every:
        if frame.call is not None and any(node.target in _choosers() for node in frame.gm.graph.nodes):
            frame.gm.meta.setdefault("_checkpoint_context_fn", _keeping_choices)
    handles = set_apart(unit.gm.graph, large, kept)
    forget_marks(unit.gm.graph)
    for frame in reversed(every):  # innermost first: what a body no longer uses need not be computed around it
        remove_dead_code(frame.gm.graph)
        drop_unused_operands(frame)
    return replace(unit, dropped=tuple(dropped), deferred=deferred, handles=handles)


def _choosers() -> list[Any]:
    ops = torch.ops.sptc
    return [ops.choose_units.default, ops.fit_linear.default, ops.select_blocks.default, ops.route.default, ops.keep.default]


def _keeping_choices() -> tuple[Any, Any]:
    """The contexts of a checkpoint that computes everything again but what was chosen, as rounding could choose otherwise in backward, and
    what is little of much work (`sptc::keep`)."""
    return create_selective_checkpoint_contexts(_choosers())


def sparse_form(region: Region, settings: Settings, state: State | None, by_graph: Mapping[fx.Graph, Frame], tokens: TokenLists) -> Node:
    """Insert the sparse operators of a region before its `y`; returns the node that can replace `y`, which nothing uses yet.

    `tokens` is what `insert_tokens` returned; checkpoint bodies get its nodes as operands.
    """

    def here(node: Node) -> Node:
        return hand_down(node, by_graph[node.graph], by_graph[region.y.graph])

    if isinstance(settings, UnitSettings):
        assert region.kind == "ffn"
        rows: Tokens = pytree.tree_map_only(Node, here, tokens.by_rows[settings.rows])
        if settings.rows != "counted" and not fits(tokens.padded, region):
            rows = rows._replace(sample=None)
        if settings.gradients_only:
            return rewrite_gradients(region, settings, rows, again=settings.recompute or by_graph[region.y.graph].call is not None)
        return rewrite_units(region, settings, rows)
    if region.kind == "ffn":
        assert isinstance(settings, FfnSettings) and (state is None or isinstance(state, RouterState))
        return rewrite_blocks(region, settings, state, here(tokens.mask) if settings.keep and tokens.mask is not None else None)
    assert isinstance(settings, AttentionSettings) and (state is None or isinstance(state, CodebookState))
    return rewrite_attention(_with_mask_at_hand(region, by_graph), settings, state)


def _with_mask_at_hand(region: AttentionRegion, by_graph: Mapping[fx.Graph, Frame]) -> AttentionRegion:
    """The region with the operands of its mask, read outside of its checkpoint body, passed into the body."""
    end = by_graph[region.y.graph]

    def local(node: Any) -> Any:
        return hand_down(node, by_graph[node.graph], end) if isinstance(node, Node) else node

    mask = region.mask
    tensors, sizes = (tuple(map(local, operands)) for operands in (mask.tensors, mask.sizes))
    return replace(region, mask=replace(mask, tensors=tensors, sizes=sizes, boolean=local(mask.boolean), bias=local(mask.bias)))


def _erase(decision: Decision) -> None:
    """Remove the dense nodes; dead code elimination alone would keep dropout, which draws random numbers."""
    region = decision.region
    for node in reversed(region.y.graph.nodes):
        if node in region.nodes and not node.users:
            region.y.graph.erase_node(node)
