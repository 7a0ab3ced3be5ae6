"""Find attention regions: y = softmax(scale * q k^T + mask) v, as one operator or spelled out.

A softmax is a candidate if a product of two tensors leads to it through elementwise operators and a product follows it. From there on
every operator is either understood (scale, mask, dropout, cast, view) or the candidate is refused with the reason.
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
from sptc.passes.find.attention_operands import Operand, grouped, key_of, merged_heads, query_of, split_heads, without_empty
from sptc.passes.find.lookalike import Flow, between_products
from sptc.passes.graph.boundary import breach, disturbance
from sptc.passes.graph.pattern import (
    COPIES,
    EINSUM,
    VIEWS,
    argument,
    base_name,
    dtype,
    op,
    plain_number,
    same_size,
    shape,
    transparent,
    value,
)
from sptc.passes.graph.site import called, site_of
from sptc.passes.mask.mask import MASKED, Layout, MaskInput, Refused, read_mask
from sptc.passes.mask.reader import Reader

FUSED = "aten.scaled_dot_product_attention.default"
SOFTMAX = frozenset({"aten.softmax.int", "aten._softmax.default"})
PRODUCTS = frozenset({"aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default"})
DROPOUT = "aten.dropout.default"
_MOVES = VIEWS | {  # looked through to find candidates; those that a region does not have are refusals then
    "aten.cat.default",
    "aten.slice.Tensor",
    "aten.narrow.default",
    "aten.constant_pad_nd.default",
    "aten.pad.default",
    "aten.expand.default",
    "aten.permute.default",
    "aten.transpose.int",
    "aten.mT.default",
}


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
    draft = Draft(q, k, v, node, float(scale), float(p), bool(argument(node, 5, "is_causal", False)), nodes={node})
    if isinstance(mask, Node):
        draft.masks.append((MaskInput("keep" if dtype(mask) == torch.bool else "add", mask), (*shape(q.node)[:3], shape(k.node)[2])))
    return draft


def _spelled_out(softmax: Node, reader: Reader, flow: Flow) -> Draft | None:
    """The candidate around a softmax; None if no product leads to it or follows it, by whatever way."""
    draft = draft_of(softmax, reader)
    odd = between_products(softmax, flow, lambda n: _pointwise(n) or op(n) in _MOVES or base_name(n) == DROPOUT) if draft is None else None
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
    if weights is None or not _from_product(softmax.args[0]):
        return None
    rank = len(shape(softmax))
    if argument(softmax, 1, "dim") not in (-1, rank - 1):
        raise Refused("softmax-dim", softmax, f"softmax runs over dimension {argument(softmax, 1, 'dim')}, not over the keys")
    product = weights[-1]
    _refuse_einsum(product)
    scores = _Scores(reader)
    q, k = scores.walk(softmax.args[0])
    draft = Draft(q, k, Operand(_node(product, 1)), product, scores.scale, masks=scores.masks)
    draft.nodes = {softmax, *scores.nodes, *weights}
    for node in weights[:-1]:
        name = base_name(node)
        if name == DROPOUT:
            if draft.dropout_p:
                raise Refused("dropout", node, "attention weights are dropped twice")
            _, p, train = node.args
            draft.dropout_p = float(p) if train else 0.0  # type: ignore[arg-type]
        elif not transparent(node) and name not in VIEWS:
            raise Refused("weights", node, f"{called(node)} ({op(node)}) changes the attention weights after softmax")
    return draft


def _to_product(softmax: Node) -> list[Node] | None:
    """The nodes that lead from softmax to the product with v, that product last."""
    paths: dict[Node, list[Node]] = {softmax: []}
    queue = deque([softmax])
    while queue:
        here = queue.popleft()
        for user in here.users:
            if _is_product(user) and (op(user) == EINSUM or _node(user, 0) is here):
                return [*paths[here], user]
            if user not in paths and (base_name(user) == DROPOUT or _pointwise(user) or op(user) in _MOVES):
                paths[user] = [*paths[here], user]
                queue.append(user)
    return None


def _from_product(node: Any) -> bool:
    """Whether a product of two tensors leads to `node` through elementwise operators and views."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        here = todo.pop()
        if not isinstance(here, Node) or here in seen:
            continue
        seen.add(here)
        if _is_product(here):
            return True
        if _pointwise(here) or op(here) in _MOVES or base_name(here) == DROPOUT:
            todo += here.all_input_nodes
    return False


_FLOORS = frozenset({"aten.max.other", "aten.maximum.default", "aten.clamp.default", "aten.clamp_min.default"})
_UNTAGGED = frozenset(  # elementwise, but torch does not tag these overloads as such
    {
        "aten.max.other",
        "aten.where.ScalarOther",
        "aten.where.ScalarSelf",
        "aten.where.Scalar",
        "aten.masked_fill.Scalar",
        "aten.masked_fill.Tensor",
        "aten.mul.Tensor",
        "aten.div.Tensor",
        "aten.add.Tensor",
        "aten.sub.Tensor",
    }
)


def _pointwise(node: Node) -> bool:
    name = base_name(node)
    return bool(name) and (name in COPIES or name in _UNTAGGED or torch.Tag.pointwise in node.target.tags)  # type: ignore[union-attr]


def _is_product(node: Any) -> bool:
    return op(node) in PRODUCTS or (op(node) == EINSUM and len(node.args[1]) == 2)


def _refuse_einsum(node: Node) -> None:
    """Einsums of the usual layouts are matrix products by now."""
    if op(node) == EINSUM:
        raise Refused("layout", node, f'the einsum "{node.args[0]}" is not one batched product of two matrices')


def _constant(node: Node, name: str) -> float:
    """An optional factor of a sum or product, such as `alpha`."""
    factor = plain_number(node.kwargs.get(name, 1))
    if factor is None:
        raise Refused("scale", node, f"{name} of {called(node)} is computed in the graph")
    return factor


def _node(product: Node, position: int) -> Node:
    """The first (0) or second (1) factor of a product."""
    factor = product.args[position + (op(product) == "aten.baddbmm.default")]
    assert isinstance(factor, Node)
    return factor


class _Scores:
    """Walks from softmax back to q k^T, collecting scale, masks and nodes."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.scale = 1.0  # of what was walked past: between here and the softmax
        self.masks: list[tuple[MaskInput, tuple[Any, ...]]] = []
        self.nodes: set[Node] = set()

    def walk(self, node: Any) -> tuple[Operand, Operand]:
        """q and k of the product, their own scales taken into `scale`."""
        while op(node) not in PRODUCTS:
            self.nodes.add(node)
            node = self._step(node)
        self.nodes.add(node)
        if op(node) == "aten.baddbmm.default":
            beta, alpha = (_constant(node, name) for name in ("beta", "alpha"))
            if beta != 0:
                self._mask("add", node.args[0], node, self.scale * beta)
            self.scale *= alpha
        q, q_scale = query_of(_node(node, 0), self._reader)
        k, k_scale = key_of(_node(node, 1), self._reader)
        self.scale *= q_scale * k_scale
        return q, k

    def _mask(self, how: Any, mask: Any, node: Node, factor: float = 1.0) -> None:
        self.masks.append((MaskInput(how, mask, factor), shape(node)))

    def _step(self, node: Node) -> Node:
        """Takes in what `node` does to the scores and returns the scores before it."""
        _refuse_einsum(node)
        name = base_name(node)
        first: Any = node.args[0]
        if transparent(node):
            return first
        if name in VIEWS:
            if not all(same_size(a, b) for a, b in zip(shape(first)[-2:], shape(node)[-2:], strict=True)):
                raise Refused("scores", node, f"{called(node)} rearranges queries and keys of the scores")
            return first
        if name in ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"):
            return self._scaled(node)
        if name in ("aten.add.Tensor", "aten.sub.Tensor"):
            return self._added(node)
        if name in ("aten.masked_fill.Scalar", "aten.masked_fill.Tensor"):
            self._masks_out(node, node.args[2])
            self._mask("drop", node.args[1], node)
            return first
        if name.startswith("aten.where."):
            keep, then, other = node.args
            kept, fill = (then, other) if _from_product(then) else (other, then)
            self._masks_out(node, fill)
            self._mask("keep" if kept is then else "drop", keep, node)
            return kept  # type: ignore[return-value]
        if name in _FLOORS:
            return self._above_a_floor(node)
        if name == DROPOUT:
            raise Refused("dropout", node, f"{called(node)} drops attention scores before softmax")
        raise Refused("scores", node, f"{called(node)} ({op(node)}) changes the scores between q k^T and softmax")

    def _scaled(self, node: Node) -> Node:
        a, b = node.args[:2]
        for scores, factor in ((a, b), (b, a)):
            number = self._reader.constant(factor)
            if number is not None and isinstance(scores, Node):
                divides = base_name(node).startswith("aten.div.")
                if (divides and scores is b) or number <= 0:
                    break
                self.scale *= 1 / number if divides else number
                return scores
        raise Refused("scale", node, f"{called(node)} ({op(node)}) scales the scores by something other than a positive constant")

    def _added(self, node: Node) -> Node:
        a, b = node.args[:2]
        products = [_from_product(a), _from_product(b)]
        if all(products):
            raise Refused("scores", node, f"{called(node)} adds two products: scores and a second term computed from q or k")
        scores, mask = (a, b) if products[0] else (b, a)
        factor = _constant(node, "alpha") * (-1 if base_name(node) == "aten.sub.Tensor" else 1)
        if scores is not a and factor != 1:
            raise Refused("scores", node, f"{called(node)} subtracts the scores")
        if not isinstance(value(mask), torch.Tensor):
            return scores  # softmax is the same for scores that are all greater by one number
        if not all(same_size(x, y) for x, y in zip(shape(scores), shape(node), strict=True)):
            raise Refused("shape", node, f"{called(node)} broadcasts the scores to {_sizes(node)}")
        self._mask("add", mask, node, self.scale * factor)
        return scores  # type: ignore[return-value]

    def _above_a_floor(self, node: Node) -> Node:
        """The scores before they were raised to a number so low that it masks: only what is masked changes."""
        first: Any = node.args[0]
        a, floor = first, argument(node, 1, "min" if "clamp" in op(node) else "other")
        scores, floor = (a, floor) if _from_product(a) else (floor, a)
        number = self._reader.constant(floor)
        if number is None or number > MASKED or argument(node, 2, "max") is not None:
            raise Refused("scores", node, f"{called(node)} ({op(node)}) bounds the scores by {floor}")
        return scores

    def _masks_out(self, node: Node, fill: Any) -> None:
        number = self._reader.constant(fill)
        if number is None or number > MASKED:
            raise Refused("scores", node, f"{called(node)} fills scores with {fill}, which does not mask them")


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
    mask = read_mask([(given, layouts[len(sizes)]) for given, sizes in draft.masks], layouts[4], draft.is_causal, outer)
    passed = (*draft.q.passed, *k.passed, *v.passed)
    if (found := breach(draft.nodes, draft.y) or disturbance(passed, draft.y)) is not None:
        raise Refused(found.rule, found.node, found.reason)
    nodes = frozenset(_with_exclusive(draft.nodes, passed))
    return AttentionRegion(q, k.node, v.node, draft.y, draft.scale, draft.dropout_p, mask, nodes, site_of(draft.nodes))


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
