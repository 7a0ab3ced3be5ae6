"""The scores of attention: from a softmax back to the product of queries and keys, through whatever is understood of what is between.

Scale, masks and biases, a function of each score that rises with it (a soft cap), and a column behind them that is dropped after the
softmax (a sink). Anything else is a refusal.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from sptc.ir import expression
from sptc.passes.find.attention_operands import Operand, key_of, query_of
from sptc.passes.graph.pattern import (
    COPIES,
    EINSUM,
    VIEWS,
    argument,
    aten,
    base_name,
    op,
    plain_number,
    same_size,
    shape,
    transparent,
    value,
)
from sptc.passes.graph.site import called
from sptc.passes.mask.mask import MASKED, MaskInput, Refused
from sptc.passes.mask.reader import Reader

PRODUCTS = frozenset({"aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default"})
DROPOUT = "aten.dropout.default"
# Looked through to find candidates; those that a region does not have are refusals then.
MOVES = VIEWS | aten(
    *("cat.default", "slice.Tensor", "narrow.default", "constant_pad_nd.default", "pad.default", "expand.default"),
    *("permute.default", "transpose.int", "mT.default"),
)
_RISING = frozenset({"aten.tanh.default", "aten.sigmoid.default", "aten.erf.default"})  # bounded, and greater for a greater score


def from_product(node: Any) -> bool:
    """Whether a product of two tensors leads to `node` through elementwise operators and views."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        here = todo.pop()
        if not isinstance(here, Node) or here in seen:
            continue
        seen.add(here)
        if is_product(here):
            return True
        if pointwise(here) or op(here) in MOVES or base_name(here) == DROPOUT:
            todo += here.all_input_nodes
    return False


_MASKED_AND_SCALED = -1e3  # what is left of a number that masks: -1e4 before a division by sqrt(64) is a mask, before one by 1e4 it is none
_FLOORS = frozenset({"aten.max.other", "aten.maximum.default", "aten.clamp.default", "aten.clamp_min.default"})
_UNTAGGED = aten(  # elementwise, but torch does not tag these overloads as such
    *("max.other", "where.ScalarOther", "where.ScalarSelf", "where.Scalar", "masked_fill.Scalar", "masked_fill.Tensor"),
    *("mul.Tensor", "div.Tensor", "add.Tensor", "sub.Tensor"),
)


def pointwise(node: Node) -> bool:
    name = base_name(node)
    return bool(name) and (name in COPIES or name in _UNTAGGED or torch.Tag.pointwise in node.target.tags)  # type: ignore[union-attr]


def is_product(node: Any) -> bool:
    return op(node) in PRODUCTS or (op(node) == EINSUM and len(node.args[1]) == 2)


def refuse_einsum(node: Node) -> None:
    """Einsums of the usual layouts are matrix products by now."""
    if op(node) == EINSUM:
        raise Refused("layout", node, f'the einsum "{node.args[0]}" is not one batched product of two matrices')


def _constant(node: Node, name: str) -> float:
    """An optional factor of a sum or product, such as `alpha`."""
    factor = plain_number(node.kwargs.get(name, 1))
    if factor is None:
        raise Refused("scale", node, f"{name} of {called(node)} is computed in the graph")
    return factor


def operand_of(product: Node, position: int) -> Node:
    """The first (0) or second (1) factor of a product."""
    factor = product.args[position + (op(product) == "aten.baddbmm.default")]
    assert isinstance(factor, Node)
    return factor


class Scores:
    """Walks from softmax back to q k^T, collecting scale, masks, what the scores become, and nodes.

    The scores that `scale` and `transform` make of the product are transform(scale * q k^T), and the masks apply after that.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.scale = 1.0  # of what was walked past: between here and the softmax, or the function of the scores behind here
        self._function: sympy.Expr = expression.U0  # of a score, that scale included, from there on to the softmax
        self.masks: list[tuple[MaskInput, tuple[Any, ...]]] = []
        self.sink: Node | None = None
        self.nodes: set[Node] = set()

    def walk(self, node: Any) -> tuple[Operand, Operand]:
        """q and k of the product, their own scales taken into `scale`."""
        while op(node) not in PRODUCTS:
            self.nodes.add(node)
            before = self._step(node)
            alike = len(shape(before)) == len(shape(node)) and all(map(same_size, shape(before), shape(node)))
            if not alike and base_name(node) not in VIEWS and base_name(node) != "aten.cat.default":
                raise Refused("shape", node, f"{called(node)} broadcasts the scores to {list(shape(node))}")
            node = before
        self.nodes.add(node)
        if op(node) == "aten.baddbmm.default":
            beta, alpha = (_constant(node, name) for name in ("beta", "alpha"))
            if beta != 0:
                self._mask("add", node.args[0], node, self.scale * beta)
            self.scale *= alpha
        q, q_scale = query_of(operand_of(node, 0), self._reader)
        k, k_scale = key_of(operand_of(node, 1), self._reader)
        if not self._slope > 0:
            raise Refused("scores", node, f"the scores of {called(node)} go through a function that is flat at 0")
        self.scale *= q_scale * k_scale * self._slope
        return q, k

    @property
    def transform(self) -> str:
        """The function of the scaled scores, its slope at 0 taken into `scale`: near 0 they are what the softmax gets."""
        return expression.canonical(self._function.subs(expression.U0, expression.U0 * expression.number(1 / self._slope)))

    @property
    def _slope(self) -> float:
        """The slope of the function at 0."""
        return float(expression.evaluate(expression.derivative(self._function), torch.zeros((), dtype=torch.float64)))

    def _mask(self, how: Any, mask: Any, node: Node, factor: float = 1.0) -> None:
        self._nothing_behind(node)
        self.masks.append((MaskInput(how, mask, factor), shape(node)))

    def _step(self, node: Node) -> Node:
        """Takes in what `node` does to the scores and returns the scores before it."""
        refuse_einsum(node)
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
        if name in _RISING:
            return self._bent(node)
        if name == "aten.cat.default":
            return self._without_sink(node)
        if name in ("aten.add.Tensor", "aten.sub.Tensor"):
            return self._added(node)
        if name in ("aten.masked_fill.Scalar", "aten.masked_fill.Tensor"):
            self._masks_out(node, node.args[2])
            self._mask("drop", node.args[1], node)
            return first
        if name.startswith("aten.where."):
            keep, then, other = node.args
            kept, fill = (then, other) if from_product(then) else (other, then)
            self._masks_out(node, fill)
            self._mask("keep" if kept is then else "drop", keep, node)
            return kept  # type: ignore[return-value]
        if name in _FLOORS:
            return self._above_a_floor(node)
        if name == DROPOUT:
            raise Refused("dropout", node, f"{called(node)} drops attention scores before softmax")
        raise Refused("scores", node, f"{called(node)} ({op(node)}) changes the scores between q k^T and softmax")

    def _without_sink(self, node: Node) -> Node:
        """The scores before a column was put behind them, of which the softmax is the only one to know."""
        parts: Any = node.args[0]
        last = len(shape(node)) - 1
        alone = self.sink is None and not self.masks and self.scale == 1.0 and self._function == expression.U0
        if not (alone and len(parts) == 2 and argument(node, 1, "dim", 0) in (-1, last) and same_size(shape(parts[1])[-1], 1)):
            raise Refused(
                "scores", node, f"{called(node)} ({op(node)}) puts more beside the scores than one column, which the softmax reads at once"
            )
        if len(shape(node)) != 4 or not from_product(parts[0]):
            raise Refused(
                "rank", node, f"{called(node)} puts a column beside scores that are not laid out as [batch, heads, n, m], or before them"
            )
        self.sink = parts[1]
        return parts[0]  # type: ignore[no-any-return]

    def _less_their_greatest(self, node: Node) -> list[Node]:
        """The nodes that compute what is subtracted from scores, if that is the greatest one of each row: it changes no weight."""
        scores, found = node.args[0], []
        here: Any = node.args[1] if base_name(node) == "aten.sub.Tensor" and not node.kwargs else None
        while op(here) in COPIES or (isinstance(here, Node) and here.target is operator.getitem and here.args[1] == 0):
            found.append(here)
            here = here.args[0]
        if op(here) not in ("aten.max.dim", "aten.amax.default") or here.args[0] is not scores or not argument(here, 2, "keepdim", False):
            return []
        dims = argument(here, 1, "dim")
        last = len(shape(scores)) - 1
        return [*found, here] if dims in (-1, last, [-1], [last]) else []

    def _bent(self, node: Node) -> Node:
        """The scores before a function of each.

        It rises with its score, so that block selection, which never computes it, orders single scores as it would.
        """
        lifted = expression.lift(op(node), [expression.U0], {})
        assert lifted is not None
        self._function = expression.normal(self._function.subs(expression.U0, lifted * expression.number(self.scale)))
        self.scale = 1.0
        return node.args[0]  # type: ignore[return-value]

    def _nothing_behind(self, node: Node) -> None:
        """Refuses a mask, a bias or a number that is applied before a function of the scores, which would change it too."""
        if self._function != expression.U0:
            raise Refused("scores", node, f"{called(node)} ({op(node)}) masks the scores or adds to them before a function of each")

    def _nothing_beside(self, node: Node) -> None:
        """Refuses what moves all scores of a row alike before a sink, which stays where it is and has another weight then."""
        if self.sink is not None:
            raise Refused("scores", node, f"{called(node)} ({op(node)}) moves the scores of a row, but not the column beside them")

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
        if greatest := self._less_their_greatest(node):
            self._nothing_behind(node)
            self._nothing_beside(node)
            self.nodes.update(greatest)
            return a  # type: ignore[return-value]
        products = [from_product(a), from_product(b)]
        if all(products):
            raise Refused("scores", node, f"{called(node)} adds two products: scores and a second term computed from q or k")
        scores, mask = (a, b) if products[0] else (b, a)
        factor = _constant(node, "alpha") * (-1 if base_name(node) == "aten.sub.Tensor" else 1)
        if scores is not a and factor != 1:
            raise Refused("scores", node, f"{called(node)} subtracts the scores")
        if not isinstance(value(mask), torch.Tensor):
            self._nothing_behind(node)
            self._nothing_beside(node)
            return scores  # softmax is the same for scores that are all greater by one number
        self._mask("add", mask, node, self.scale * factor)
        return scores  # type: ignore[return-value]

    def _above_a_floor(self, node: Node) -> Node:
        """The scores before they were raised to a number so low that it masks: only what is masked changes."""
        first: Any = node.args[0]
        a, floor = first, argument(node, 1, "min" if "clamp" in op(node) else "other")
        scores, floor = (a, floor) if from_product(a) else (floor, a)
        if not self._masked_by(floor) or argument(node, 2, "max") is not None:
            raise Refused("scores", node, f"{called(node)} ({op(node)}) bounds the scores by {floor}")
        self._nothing_behind(node)
        return scores

    def _masks_out(self, node: Node, fill: Any) -> None:
        if not self._masked_by(fill):
            scaled = "" if self.scale == 1.0 else f" and scales them by {self.scale:.3g}"
            raise Refused("scores", node, f"{called(node)} fills scores with {fill}{scaled}, which does not mask them")

    def _masked_by(self, fill: Any) -> bool:
        """Whether a number among the scores is so low that softmax gives nothing for it, scaled as it still is on its way there."""
        number = self._reader.constant(fill)
        return number is not None and number <= MASKED and number * self.scale <= _MASKED_AND_SCALED
