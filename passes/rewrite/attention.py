"""An attention region as a choice of key blocks and one `sptc::sparse_attention`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sptc.ir.region import AttentionRegion, AttentionSettings, CodebookState, Site
from sptc.passes.graph.boundary import alias_sets, written_by
from sptc.passes.graph.insert import cast, insert, kept
from sptc.passes.graph.pattern import dtype, exchanged, same_size, shape, value

aten = torch.ops.aten
_BY_STRIDES = (aten.as_strided.default, aten.as_strided_scatter.default)
_JOINS = (aten.reshape.default, aten.flatten.using_ints)


def rewrite_attention(region: AttentionRegion, settings: AttentionSettings, state: CodebookState | None) -> Node:
    """Insert the sparse attention before `region.y`; returns the node that replaces it."""
    mask, y = region.mask, region.y
    trained = () if state is None else (state.codebooks, state.code_sums, state.code_counts)
    read = (region.q, region.k, region.v, *mask.tensors, *mask.sizes, mask.boolean, mask.bias, region.sink)
    nodes = {**kept(y, [n for n in read if isinstance(n, Node)]), **{n: n for n in trained}}
    form = replace(region, nodes=frozenset(), site=Site("", "")), settings, state  # equal in all layers, but for nodes
    to, own, together, free = dtype(y), _is_told(y), _heads_together(y), _is_free(y)

    def run(tensors: dict[Node, Any]) -> Tensor:
        out = cast(_attention(*exchanged(form, tensors)), to)
        if own:
            return out.clone(memory_format=torch.preserve_format if together else torch.contiguous_format)
        return out if together or free else out.contiguous()

    number = {node: f"node {i}" for i, node in enumerate((*nodes, y))}
    alike = ("attention", exchanged(form, number), to, own, together, free)
    result: Node = insert(y, run, nodes, alike=alike)
    return result


def _attention(region: Any, settings: AttentionSettings, state: Any) -> Tensor:
    """softmax(f(scale * q k^T) + mask) v over the keys in the blocks that each tile of queries keeps (docs/design/operators.md).

    Args:
        region: an AttentionRegion with tensors in place of nodes: q [b, h, n, d], k [b, h_kv, m, d], v [b, h_kv, m, d_v], all of one
            dtype, the operands of its mask, and sink [b, h, n, 1] or None.
        settings: blocks and density.
        state: a CodebookState with tensors, fp32, in place of nodes; None: without codebooks.

    Returns:
        [b, h, n, d_v], of the dtype of the products, heads of a position together as fused attention has them.
    """
    q, k, v, mask, bias = region.q, region.k, region.v, region.mask, region.mask.bias
    if bias is not None and mask.merged:
        bias = bias.unflatten(0, (-1, q.shape[1]))
    if bias is not None and not bias.is_floating_point():
        bias = bias.to(torch.promote_types(q.dtype, torch.float32))
    operands = mask.predicate, mask.tensors, mask.sizes, mask.boolean, bias
    blocks = settings.query_block, settings.key_block
    statistics, own = state is not None and state.training, mask.causal and settings.query_block > 1
    ids, counts, code_sums, code_counts = torch.ops.sptc.select_blocks(
        *(q.detach(), k.detach(), None if state is None else state.codebooks, *operands),
        *(settings.selector, settings.density, region.scale, *blocks, own, statistics),
    )
    if statistics:  # only ever accumulated here: a codebook changes between steps
        state.code_sums.add_(code_sums)
        state.code_counts.add_(code_counts)
    # Drawn in this graph, so that recomputation in a checkpoint draws the same one.
    seed = torch.randint(0, 2**63 - 1, (1,), device=q.device) if region.dropout_p else None
    y: Tensor = torch.ops.sptc.sparse_attention(
        q, k, v, ids, counts, *operands, seed, region.dropout_p, region.scale, *blocks, region.transform, region.sink
    )[0]
    return y + cast(_zero_times(v, q.shape[1]), y.dtype) if settings.density == 1.0 and mask.hides else y


def _zero_times(v: Tensor, heads: int) -> Tensor:
    """[b, heads, 1, d_v]: 0 times the values [b, h_kv, m, d_v] of all keys, summed; zeros, where all values are finite.

    Softmax gives a masked key the weight 0, and 0 times NaN is NaN in the dense product, so that one token without a number spoils every
    row of its sequence and the loss shows it. Sparse attention skips what is masked. Without gradient, as 0 has none.
    """
    total = (v.detach() * 0).sum(2, keepdim=True)
    return total if same_size(v.shape[1], heads) else total.repeat_interleave(heads // v.shape[1], 1)


def _is_told(y: Node) -> bool:
    """Whether `y` is written to in place later, or read by strides.

    The result is a copy then: the operator needs its output for backward, where the products that it replaces did not; and views that are
    written to are views still (passes/normalize/lower.py), whose meaning depends on strides.
    """
    aliases = None
    for node in y.graph.nodes:
        if node > y and (told := [*written_by(node), *(node.all_input_nodes if node.target in _BY_STRIDES else ())]):
            aliases = aliases or alias_sets(y.graph)
            if any(aliases[target] == aliases[y] for target in told):
                return True
    return False


def _is_free(y: Node) -> bool:
    """Whether nothing tells how `y` lies: its heads are put together and copied, as before the projection that follows attention.

    Else strides travel on, through elementwise operators too, and out of the graph, where a `view` may count on them.
    """
    return all(_swaps(user) and all(_copies(copy, value(y).shape[-1]) for copy in user.users) for user in y.users)


def _swaps(node: Node) -> bool:
    """Whether positions and heads of [b, h, n, d] change places."""
    if node.target is aten.transpose.int:
        return {axis % 4 for axis in node.args[1:3]} == {1, 2}  # type: ignore[operator]
    return node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]


def _copies(node: Node, d: Any) -> bool:
    """Whether [b, n, h, d] is copied, whichever of the two ways it lies: made contiguous, or with heads and features as one axis."""
    if node.target is aten.clone.default:
        return node.kwargs.get("memory_format") is torch.contiguous_format
    return node.target is aten.contiguous.default or (node.target in _JOINS and not same_size(value(node).shape[-1], d))


def _heads_together(y: Node) -> bool:
    """Whether `y` has the strides of fused attention, which keeps the heads of a position together, and those of the operator."""
    _, h, _, d = shape(y)
    strides = value(y).stride()
    return same_size(strides[1], d) and same_size(strides[2], h * d) and not same_size(h, 1)
