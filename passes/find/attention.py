"""Find attention regions: y = softmax(f(scale * q k^T) + mask) v, as one operator or spelled out.

A softmax is a candidate if a product of two tensors leads to it through elementwise operators and a product follows it. From there on
every operator is either understood (scale, soft cap, mask, sink, dropout, cast, view) or the candidate is refused with the reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from sptc.ir.region import AttentionRegion, Found, Refusal
from sptc.passes.find.attention_operands import Operand, grouped, merged_heads, split_heads, without_empty
from sptc.passes.find.lookalike import Flow, between_products
from sptc.passes.find.scores import DROPOUT, MOVES, Scores, from_product, is_product, operand_of, pointwise, refuse_einsum
from sptc.passes.graph.boundary import breach, disturbance
from sptc.passes.graph.pattern import (
    EINSUM,
    VIEWS,
    argument,
    base_name,
    dtype,
    op,
    same_size,
    shape,
    transparent,
)
from sptc.passes.graph.site import called, site_of
from sptc.passes.mask.mask import Layout, MaskInput, Refused, read_mask
from sptc.passes.mask.reader import Reader

FUSED = "aten.scaled_dot_product_attention.default"
SOFTMAX = frozenset({"aten.softmax.int", "aten._softmax.default"})


def find_attention(gm: fx.GraphModule, outer: Mapping[Node, Node] | None = None) -> Found:
    """Attention regions and refusals of one graph; bodies of checkpoints are graphs of their own.

    Args:
        gm: a normalised graph.
        outer: for the body of a checkpoint: what each of its placeholders is in the graph around it. Masks are then read there, and
            `Mask.tensors` and `Mask.sizes` may be nodes of that graph. Without it a mask built outside stays an operand.
    """
    regions: list[AttentionRegion] = []
    refusals: list[Refusal] = []
    reader, flow = Reader(outer), Flow(gm.graph)
    for node in gm.graph.nodes:
        try:
            draft = _fused(node) if op(node) == FUSED else _spelled_out(node, reader, flow) if op(node) in SOFTMAX else None
            if _is_normalized(node) and between_products(node, flow, lambda _: True) is not None:
                raise Refused("softmax", node, f"a softmax written as {called(node)} (aten.exp) and a division by its sum is not read")
            if draft is not None:
                regions.append(_region(draft, outer))
        except Refused as refused:
            refusals.append(Refusal("attention", refused.rule, refused.node, str(refused), site_of([node])))
    return Found(tuple(regions), tuple(refusals))


@dataclass
class Draft:
    """A candidate on its way to a region."""

    q: Operand
    k: Operand
    v: Operand
    y: Node
    scale: float
    transform: str = "u0"
    sink: Node | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    masks: list[tuple[MaskInput, tuple[Any, ...]]] = field(default_factory=list)  # with the shape of the scores where they apply
    nodes: set[Node] = field(default_factory=set)  # what no one else may use


def _fused(node: Node) -> Draft:
    q, k, v = (Operand(arg) for arg in node.args[:3] if isinstance(arg, Node))
    for name, operand in (("q", q), ("k", k), ("v", v)):
        if len(shape(operand.node)) != 4:
            raise Refused("rank", node, f"{name} has the shape {_sizes(operand.node)}, not [batch, heads, length, size]")
    mask, p = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = shape(q.node)[-1] ** -0.5
    if not isinstance(scale, int | float) or not isinstance(p, int | float):
        raise Refused("scale", node, "scale or dropout is computed in the graph")
    draft = Draft(q, k, v, node, float(scale), dropout_p=float(p), is_causal=bool(argument(node, 5, "is_causal", False)), nodes={node})
    if isinstance(mask, Node):
        draft.masks.append((MaskInput("keep" if dtype(mask) == torch.bool else "add", mask), (*shape(q.node)[:3], shape(k.node)[2])))
    return draft


def _spelled_out(softmax: Node, reader: Reader, flow: Flow) -> Draft | None:
    """The candidate around a softmax; None if no product leads to it or follows it, by whatever way."""
    draft = draft_of(softmax, reader)
    odd = between_products(softmax, flow, lambda n: pointwise(n) or op(n) in MOVES or base_name(n) == DROPOUT) if draft is None else None
    if odd is not None:
        raise Refused("between", odd, f"{called(odd)} ({op(odd) or odd.target}) stands between a softmax and its products")
    return draft


def _is_normalized(node: Node) -> bool:
    """Whether a node is an exponential that is summed over one dimension too, as a softmax is when it is written by hand."""
    return op(node) == "aten.exp.default" and any(op(user) == "aten.sum.dim_IntList" for user in node.users)


def draft_of(softmax: Node, reader: Reader) -> Draft | None:
    """The candidate around a softmax; None if no product leads to it or follows it through elementwise operators and views.

    Raises:
        Refused: it is attention, but not of the form that a region has.
    """
    weights = _to_product(softmax)
    if weights is None or not from_product(softmax.args[0]):
        return None
    rank = len(shape(softmax))
    if argument(softmax, 1, "dim") not in (-1, rank - 1):
        raise Refused("softmax-dim", softmax, f"softmax runs over dimension {argument(softmax, 1, 'dim')}, not over the keys")
    product = weights[-1]
    refuse_einsum(product)
    scores = Scores(reader)
    q, k = scores.walk(softmax.args[0])
    draft = Draft(q, k, Operand(operand_of(product, 1)), product, scores.scale, scores.transform, scores.sink, masks=scores.masks)
    draft.nodes = {softmax, *scores.nodes, *weights}
    cut = [node for node in weights[:-1] if scores.sink is not None and _without_last(node)]
    if scores.sink is not None and len(cut) != 1:
        raise Refused("weights", product, f"the column that was put beside the scores is not dropped before {called(product)}")
    for node in weights[:-1]:
        name = base_name(node)
        if name == DROPOUT:
            if draft.dropout_p:
                raise Refused("dropout", node, "attention weights are dropped twice")
            _, p, train = node.args
            draft.dropout_p = float(p) if train else 0.0  # type: ignore[arg-type]
        elif not transparent(node) and name not in VIEWS and node not in cut:
            raise Refused("weights", node, f"{called(node)} ({op(node)}) changes the attention weights after softmax")
    return draft


def _without_last(node: Node) -> bool:
    """Whether a node is its first argument without its last column."""
    if op(node) != "aten.slice.Tensor" or argument(node, 1, "dim", 0) not in (-1, len(shape(node)) - 1):
        return False
    from_first = argument(node, 2, "start") in (None, 0) and argument(node, 4, "step", 1) == 1
    return from_first and same_size(shape(node)[-1] + 1, shape(node.args[0])[-1])


def _to_product(softmax: Node) -> list[Node] | None:
    """The nodes that lead from softmax to the product with v, that product last."""
    paths: dict[Node, list[Node]] = {softmax: []}
    queue = deque([softmax])
    while queue:
        here = queue.popleft()
        for user in here.users:
            if is_product(user) and (op(user) == EINSUM or operand_of(user, 0) is here):
                return [*paths[here], user]
            if user not in paths and (base_name(user) == DROPOUT or pointwise(user) or op(user) in MOVES):
                paths[user] = [*paths[here], user]
                queue.append(user)
    return None


def _region(draft: Draft, outer: Mapping[Node, Node] | None) -> AttentionRegion:
    _unmerge(draft)
    q, k, v = draft.q.node, without_empty(draft.k), without_empty(draft.v)
    for name, node in (("q", q), ("k", k.node), ("v", v.node)):
        if len(shape(node)) != 4:
            raise Refused("rank", draft.y, f"{name} has the shape {_sizes(node)}, not [batch, heads, length, size]")
    k, v = _ungroup(k, v, shape(q)[1])
    _check(draft, q, k.node, v.node)
    (b, h, n, _), m = shape(q), shape(k.node)[2]
    layouts = {3: Layout(b, h, n, m, merged=True), 4: Layout(b, h, n, m)}
    for given, sizes in draft.masks:
        if len(sizes) not in layouts or (len(sizes) == 4 and not same_size(sizes[1], h)):
            raise Refused("rank", given.node, f"{called(given.node)} masks scores laid out as {list(sizes)}, not as [batch, heads, n, m]")
    if (sink := draft.sink) is not None and not all(same_size(x, y) for x, y in zip(shape(sink), (b, h, n, 1), strict=True)):
        reason = f"{called(sink)} of {_sizes(sink)} is put beside scores that are not laid out as [batch, heads, n, m] there"
        raise Refused("rank", sink, reason)
    mask = read_mask([(given, layouts[len(sizes)]) for given, sizes in draft.masks], layouts[4], draft.is_causal, outer)
    passed = (*draft.q.passed, *k.passed, *v.passed)
    if (found := breach(draft.nodes, draft.y) or disturbance(passed, draft.y)) is not None:
        raise Refused(found.rule, found.node, found.reason)
    nodes = frozenset(_with_exclusive(draft.nodes, passed))
    return AttentionRegion(
        q, k.node, v.node, draft.y, draft.scale, draft.dropout_p, mask, nodes, site_of(draft.nodes), draft.transform, draft.sink
    )


def _unmerge(draft: Draft) -> None:
    """Go from [b * h, n, d] to the [b, h, n, d] nodes they are views of."""
    if len(shape(draft.y)) != 3:
        return
    split = [split_heads(operand) for operand in (draft.q, draft.k, draft.v)]
    after = merged_heads(draft.y)
    if not all(split) or after is None:
        raise Refused("rank", draft.y, f"the heads in {_sizes(draft.y)} can't be told from the batch")
    draft.q, draft.k, draft.v = split  # type: ignore[assignment]
    draft.nodes.add(after)
    draft.y = after


def _ungroup(k: Operand, v: Operand, heads: Any) -> tuple[Operand, Operand]:
    """k and v before their heads were repeated, if both were, alike."""
    fewer = grouped(k), grouped(v)
    first, second = (shape(operand.node)[1] if operand else heads for operand in fewer)
    if fewer[0] is None or fewer[1] is None or not same_size(first, second):
        return k, v
    return without_empty(fewer[0]), without_empty(fewer[1])


def _check(draft: Draft, q: Node, k: Node, v: Node) -> None:
    pairs = ((q, k, 0), (q, v, 0), (q, k, 3), (k, v, 1), (k, v, 2))
    if not all(same_size(shape(a)[dim], shape(b)[dim]) for a, b, dim in pairs):
        raise Refused("shape", draft.y, f"q {_sizes(q)}, k {_sizes(k)} and v {_sizes(v)} broadcast against each other")
    h, h_kv = shape(q)[1], shape(k)[1]
    if not all(map(same_size, shape(draft.y), (*shape(q)[:3], shape(v)[3]))):
        raise Refused("shape", draft.y, f"{called(draft.y)} of {_sizes(draft.y)} is not of the queries q {_sizes(q)} alone")
    if not (same_size(h, h_kv) or (isinstance(h, int) and isinstance(h_kv, int) and h % h_kv == 0)):
        raise Refused("shape", draft.y, f"{h} query heads do not share {h_kv} key heads evenly")


def _with_exclusive(nodes: set[Node], passed: Iterable[Node]) -> set[Node]:
    """`nodes` and those of `passed` that serve nothing else."""
    result = set(nodes)
    for node in sorted(passed, reverse=True):
        if all(user in result for user in node.users):
            result.add(node)
    return result


def _sizes(node: Node) -> str:
    return str(list(shape(node)))
