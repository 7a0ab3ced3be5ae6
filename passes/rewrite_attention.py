"""An attention region as a choice of key blocks and one `sptc::sparse_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sptc.passes.boundary import alias_sets, written_by
from sptc.passes.build import Builder, aten
from sptc.passes.pattern import dtype, same_size, shape, value
from sptc.region import AttentionRegion, AttentionSettings, CodebookState


def rewrite_attention(region: AttentionRegion, settings: AttentionSettings, state: CodebookState | None) -> Node:
    """Insert the sparse attention before `region.y`; returns the node that replaces it."""
    b = Builder(region.y)
    mask = region.mask
    q, k, v = region.q, region.k, region.v
    operands: tuple[Any, ...] = (mask.predicate, list(mask.tensors), list(mask.sizes), mask.boolean, mask.bias)
    blocks = (settings.query_block, settings.key_block)
    statistics = state is not None and state.training
    chosen = b.call(
        torch.ops.sptc.select_blocks.default,
        b.call(aten.detach.default, q),
        b.call(aten.detach.default, k),
        state.codebooks if state is not None else None,
        *operands,
        settings.selector,
        settings.density,
        region.scale,
        *blocks,
        mask.causal and settings.query_block > 1,
        statistics,
    )
    if state is not None and statistics:  # only ever accumulated here: a codebook changes between steps
        b.call(aten.add_.Tensor, state.code_sums, b.item(chosen, 2))
        b.call(aten.add_.Tensor, state.code_counts, b.item(chosen, 3))
    seed = b.seed() if region.dropout_p else None
    out = b.call(
        torch.ops.sptc.sparse_attention.default,
        q,
        k,
        v,
        b.item(chosen, 0),
        b.item(chosen, 1),
        *operands,
        seed,
        region.dropout_p,
        region.scale,
        *blocks,
    )
    y = _laid_out(b.cast(b.item(out, 0), dtype(region.y)), region.y, b)
    return b.call(aten.clone.default, y) if _is_written(region.y) else y


def _is_written(y: Node) -> bool:
    """Whether `y` is changed in place later: the operator needs its output for backward, where the products that it replaces did not."""
    written = [target for node in y.graph.nodes if node > y for target in written_by(node)]
    aliases = alias_sets(y.graph) if written else {}
    return any(aliases[target] == aliases[y] for target in written)


def _laid_out(out: Node, y: Node, b: Builder) -> Node:
    """`out` with the strides of `y`, where fused attention keeps the heads of a position together: what was captured relies on them.

    Dynamo leaves out a `contiguous` that changes nothing, so that a `view` of the transposed result may follow. Where a copy into that
    layout follows anyway, it is this one.
    """
    _, h, _, d = shape(y)
    strides = value(y).stride()
    if not (same_size(strides[1], d) and same_size(strides[2], h * d)) or same_size(h, 1):
        return out
    return b.call(aten.transpose.int, b.call(aten.contiguous.default, b.call(aten.transpose.int, out, 1, 2)), 1, 2)
