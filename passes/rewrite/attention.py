"""An attention region as a choice of key blocks and one `sptc::sparse_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sptc.ir.region import AttentionRegion, AttentionSettings, CodebookState
from sptc.passes.graph.boundary import alias_sets, written_by
from sptc.passes.graph.build import Builder, aten
from sptc.passes.graph.pattern import dtype, same_size, shape, value


def rewrite_attention(region: AttentionRegion, settings: AttentionSettings, state: CodebookState | None) -> Node:
    """Insert the sparse attention before `region.y`; returns the node that replaces it."""
    b = Builder(region.y)
    mask = region.mask
    q, k, v = region.q, region.k, region.v
    bias = mask.bias
    if mask.bias is not None and mask.merged:
        bias = b.call(aten.unflatten.int, mask.bias, 0, [-1, shape(q)[1]])
    if bias is not None and not dtype(bias).is_floating_point:  # type: ignore[union-attr]
        bias = b.cast(bias, torch.promote_types(dtype(q), torch.float32))  # type: ignore[arg-type]
    operands: tuple[Any, ...] = (mask.predicate, list(mask.tensors), list(mask.sizes), mask.boolean, bias)
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
        region.transform,
        region.sink,
    )
    y = b.item(out, 0)
    if settings.density == 1.0 and mask.hides:
        y = b.call(aten.add.Tensor, y, b.cast(_zero_times(v, shape(q)[1], b), dtype(y)))
    y = _laid_out(b.cast(y, dtype(region.y)), region.y, b)
    return b.call(aten.clone.default, y) if _is_written(region.y) else y


def _zero_times(v: Node, heads: Any, b: Builder) -> Node:
    """[b, h, 1, d_v]: 0 times the values of all keys, summed; zeros, where all values are finite.

    Softmax gives a masked key the weight 0, and 0 times NaN is NaN in the dense product, so that one token without a number spoils every
    row of its sequence and the loss shows it. Sparse attention skips what is masked. Without gradient, as 0 has none.
    """
    zeros = b.call(aten.mul.Tensor, b.call(aten.detach.default, v), 0)
    total = b.call(aten.sum.dim_IntList, zeros, [2], True)
    key_heads = shape(v)[1]
    return total if same_size(key_heads, heads) else b.call(aten.repeat_interleave.self_int, total, heads // key_heads, 1)


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
