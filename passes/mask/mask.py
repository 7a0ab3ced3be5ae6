"""From the tensors that attention scores are masked with to one `Mask`: a predicate where it can be read, operands where not.

A mask that is added to the scores masks where it is -inf, or so low that softmax gives nothing (finfo.min, -1e9, -1e4): constants of
at most `MASKED`. Rows in which everything is masked differ: they give zeros here, an average over all keys with a finite constant.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sptc.ir.condition import MIRROR, OPPOSITE, Binary, Element, Expression, Index, Literal, Not, Size
from sptc.ir.predicate import Predicate
from sptc.ir.region import Mask
from sptc.passes.graph.pattern import requires_grad, same_size, shape
from sptc.passes.graph.site import called
from sptc.passes.mask import terms
from sptc.passes.mask.reader import Reader
from sptc.passes.mask.rules import At
from sptc.passes.mask.terms import ZERO, Cases, Linear, Number, Truth, Unreadable

MASKED = -1e4
MAX_ATOMS = 48  # a longer predicate costs more than the tensor it replaces


class Refused(Exception):
    """What was found can't be rewritten: `rule`, `node` and the reason become a `Refusal`."""

    def __init__(self, rule: str, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule
        self.node = node


@dataclass(frozen=True)
class Layout:
    """The scores: sizes of batch, heads, queries and keys, and whether batch and heads are one dimension, [b * h, n, m]."""

    b: Any
    h: Any
    n: Any
    m: Any
    merged: bool = False

    def positions(self) -> At:
        """The element of the scores at (b, h, q, k)."""
        sizes = zip("bhqk", (self.b, self.h, self.n, self.m), strict=True)
        b, h, q, k = (terms.linear(Index(name, size if isinstance(size, int) else None)) for name, size in sizes)
        if not self.merged:
            return b, h, q, k
        if not isinstance(self.h, int):
            raise Unreadable("a symbolic number of heads")
        both = terms.add(terms.multiply(Linear(self.h), b), h)
        assert isinstance(both, Linear)
        return both, q, k


@dataclass(frozen=True)
class MaskInput:
    """One tensor applied to the scores, in their layout."""

    how: typing.Literal["add", "keep", "drop"]  # added to the scores; True keeps a score; True drops it
    node: Node
    factor: float = 1.0  # what an added tensor is multiplied by on its way into the softmax


def read_mask(
    inputs: Sequence[tuple[MaskInput, Layout]], frame: Layout, is_causal: bool = False, outer: Mapping[Node, Node] | None = None
) -> Mask:
    """The conjunction of `inputs`.

    Args:
        inputs: each with the layout of the scores where it applies.
        frame: the scores of the region, [b, h, n, m].
        is_causal: the operator's own flag: k <= q, aligned at the first query and key.
        outer: see `mask_reader.Reader`.

    Raises:
        Refused: two biases, a bias with a gradient ("bias-gradient"), or a layout that no operand has ("mask").
    """
    reader = Reader(outer)
    *_, q, k = Layout(frame.b, frame.h, frame.n, frame.m).positions()
    parts = [_Part(terms.compare("<=", k, q))] if is_causal else []
    parts += [_read(reader, given, layout) for given, layout in inputs]
    allowed = terms.conjunction(*(part.allowed for part in parts))
    biases = [part.bias for part in parts if part.bias is not None]
    merged = any(part.merged for part in parts)
    booleans = [part.boolean for part in parts if part.boolean is not None]
    if len(biases) > 1:
        raise Refused("mask", biases[1], "two tensors are added to the scores, and neither reads as a mask")
    if biases and requires_grad(biases[0]):
        raise Refused(
            "bias-gradient",
            biases[0],
            f"the bias {called(biases[0])} that is added to the scores needs a gradient, a matrix of all queries and keys, "
            "which sparse attention never computes; a bias that is frozen, as under LoRA, is taken",
        )
    kept = []
    for conjunct in terms.conjuncts(allowed):
        if not booleans and isinstance(conjunct, Element) and _broadcasts(conjunct, frame) and _joint(conjunct):
            booleans.append(conjunct.position)
        else:
            kept.append(conjunct)
    if len(booleans) > 1:
        raise Refused("mask", booleans[1], "two boolean masks that do not read as predicates")
    tensors: list[Node] = []
    sizes: list[Node] = []
    tree = terms.conjunction(*kept)
    return Mask(
        predicate=str(Predicate(Literal(tree) if isinstance(tree, bool) else _numbered(tree, tensors, sizes))),
        tensors=tuple(tensors),
        sizes=tuple(sizes),
        boolean=booleans[0] if booleans else None,
        bias=biases[0] if biases else None,
        merged=merged,
        causal=any(_is_causal(conjunct, frame) for conjunct in kept),
        seeing=not booleans and not biases and _all_see(tree, frame),
    )


@dataclass(frozen=True)
class _Part:
    allowed: Truth = True
    boolean: Node | None = None
    bias: Node | None = None
    merged: bool = False  # the bias is [b * h, 1 or n, m]


def _read(reader: Reader, given: MaskInput, layout: Layout) -> _Part:
    try:
        term = reader.argument(given.node, layout.positions())
        if sum(1 for _ in terms.atoms(term)) > MAX_ATOMS:
            raise Unreadable("too long")
        if given.how == "add":
            return _added(terms.as_number(term), given, layout)
        truth = terms.as_truth(term)
        return _Part(truth if given.how == "keep" else terms.negation(truth))
    except Unreadable:
        return _whole(given, layout)


def _whole(given: MaskInput, layout: Layout) -> _Part:
    """The mask as a tensor operand, because it can't be read."""
    merged = layout.merged and given.how == "add" and _unmerges(given.node, layout)
    if (layout.merged and not merged) or given.how == "drop":
        raise Refused("mask", given.node, f"the mask {called(given.node)} neither reads as a predicate nor broadcasts to the scores")
    if given.how == "keep":
        return _Part(boolean=given.node)
    if given.factor != 1.0:
        raise Refused("scale", given.node, f"the bias {called(given.node)} is scaled together with the scores")
    return _Part(bias=given.node, merged=merged)


def _unmerges(node: Node, layout: Layout) -> bool:
    """Whether a tensor has the shape [b * h, 1 or n, m]. It then is a view of one that broadcasts to [b, h, n, m]."""
    own = shape(node)
    if len(own) != 3 or not isinstance(layout.h, int):
        return False
    return same_size(own[0], layout.b * layout.h) and (same_size(own[1], 1) or same_size(own[1], layout.n)) and same_size(own[2], layout.m)


def _added(number: Number, given: MaskInput, layout: Layout) -> _Part:
    allowed, bias = _masking(terms.multiply(Linear(given.factor), number))
    if bias is None:
        return _Part(allowed)
    if not _broadcasts(bias, layout):
        if layout.merged:
            raise Unreadable("a bias of another layout")
        return _whole(given, layout)
    return _Part(allowed, bias=bias.position)


def _masking(number: Number) -> tuple[Truth, Element | None]:
    """Split a number that is added to a score into a mask and a bias.

    Returns:
        Where the score stays visible, and the element that is added to it there; None if nothing is added.

    Raises:
        Unreadable: the number is neither.
    """
    if isinstance(number, Cases):
        vanishing = number.condition == _unequal(number.other, ZERO)
        then, then_bias = _masking(number.then)
        other, other_bias = (True, None) if vanishing else _masking(number.other)
        masked_side = (then_bias is None and then is False) or (other_bias is None and other is False)
        if then_bias != other_bias and not masked_side:
            raise Unreadable("a bias by cases")
        return terms.select(number.condition, then, other), then_bias or other_bias
    if number.is_constant:
        if number.constant == 0:
            return True, None
        if number.constant <= MASKED:
            return False, None
        raise Unreadable("a constant bias")
    if len(number.terms) != 1 or not isinstance(number.terms[0][0], Element):
        raise Unreadable("a bias computed from positions")
    element, factor = number.terms[0]
    assert isinstance(element, Element)
    if terms.floating(element):
        if factor == 1 and number.constant <= MASKED:
            return False, None
        if factor != 1 or number.constant != 0:
            raise Unreadable("a scaled bias")
        return True, element
    return _flag(element, factor, number.constant), None


def _flag(element: Element, factor: float, constant: float) -> Truth:
    """Where constant + factor * flag leaves a score visible. The flag is an element of an integer tensor of ones and zeros."""
    unset, _ = _masking(Linear(constant))
    set_, _ = _masking(Linear(constant + factor))
    return terms.select(terms.compare("!=", terms.linear(element), ZERO), set_, unset)


def _unequal(a: Number, b: Number) -> Truth | None:
    try:
        return terms.compare("!=", a, b)
    except Unreadable:
        return None


def _broadcasts(element: Element, frame: Layout) -> bool:
    """Whether the element's tensor broadcasts to [b, h, n, m], and the element is that at (b, h, q, k)."""
    sizes = (frame.b, frame.h, frame.n, frame.m)
    own = shape(element.position)
    if len(own) > 4:
        return False
    pairs = zip(element.indices, own, "bhqk"[4 - len(own) :], sizes[4 - len(own) :], strict=True)
    return all(
        index == Literal(0) if same_size(size, 1) else index == Index(name) and same_size(size, full) for index, size, name, full in pairs
    )


def _joint(element: Element) -> bool:
    names = {atom.name for atom in terms.atoms(element) if isinstance(atom, Index)}
    return {"q", "k"} <= names


def _is_causal(conjunct: Truth, frame: Layout) -> bool:
    """Whether the conjunct is k <= q + (m - n)."""
    if not isinstance(conjunct, Binary) or conjunct.operator not in MIRROR:
        return False
    value, operator = terms.subtract(terms.linear_of(conjunct.left), terms.linear_of(conjunct.right)), conjunct.operator
    if operator in (">", ">="):
        value, operator = terms.negate(value), MIRROR[operator]
    assert isinstance(value, Linear)
    if dict(value.terms) != {Index("k"): 1, Index("q"): -1}:
        return False
    offset = -value.constant - (operator == "<")
    if isinstance(frame.n, int) and isinstance(frame.m, int):
        return offset == frame.m - frame.n
    return offset == 0 and same_size(frame.n, frame.m)


def _all_see(allowed: Truth, frame: Layout) -> bool:
    """Whether every query is sure to attend to a key: to the first one, the one of its own number, or that as far from the end."""
    q = terms.linear(Index("q"))
    places = [ZERO]
    if isinstance(frame.n, int) and isinstance(frame.m, int):
        shifts = (0, frame.m - frame.n) if frame.m >= frame.n else ()
        places += [Linear(shift, q.terms) for shift in shifts]
    elif same_size(frame.n, frame.m):
        places.append(q)
    return any(_holds(Literal(allowed) if isinstance(allowed, bool) else _placed(allowed, place.tree())) for place in places)


def _placed(tree: Expression, key: Expression) -> Expression:
    """`tree` with `key` for k."""
    match tree:
        case Index("k"):
            return key
        case Element(node, indices):
            return Element(node, tuple(_placed(index, key) for index in indices))
        case Not(operand):
            return Not(_placed(operand, key))
        case Binary(operator, left, right):
            return Binary(operator, _placed(left, key), _placed(right, key))
    return tree


def _holds(tree: Expression) -> bool:
    """Whether a condition holds whatever the operands hold; False where that is not seen."""
    match tree:
        case Literal(value):
            return value is True
        case Binary("&", left, right):
            return _holds(left) and _holds(right)
        case Binary("|", left, right):
            return _holds(left) or _holds(right)
        case Binary(operator, left, right) if operator in OPPOSITE:
            try:
                return terms.compare(operator, terms.linear_of(left), terms.linear_of(right)) is True
            except Unreadable:
                return False
    return False


def _numbered(tree: Expression, tensors: list[Node], sizes: list[Node]) -> Expression:
    """`tree` with numbers for tensors and sizes, as they occur; the lists get what the numbers stand for."""
    match tree:
        case Size(size):
            return Size(_position(sizes, size.node))
        case Element(node, indices):
            return Element(_position(tensors, node), tuple(_numbered(index, tensors, sizes) for index in indices))
        case Not(operand):
            return Not(_numbered(operand, tensors, sizes))
        case Binary(operator, left, right):
            return Binary(operator, _numbered(left, tensors, sizes), _numbered(right, tensors, sizes))
    return tree


def _position(nodes: list[Node], node: Node) -> int:
    if node not in nodes:
        nodes.append(node)
    return nodes.index(node)
