"""What the mask reader computes with: numbers and truths over positions, simplified as they are built.

The language is that of `sptc/ir/predicate.py`. A truth is one of its conditions, or a bool. A number is a `Linear` combination of indices,
sizes, tensor elements, quotients and remainders, or a `Cases` between two numbers. While a mask is read, what an element is taken of is
the graph's node and a size is a `SizeOf`; `mask.py` numbers both in the end. Linear parts cancel, comparisons that hold for every position
become True, choices between equal values disappear.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from sptc.ir.condition import MIRROR, OPERATORS, Binary, Element, Expression, Index, Literal, Size, negated, operands, walk
from sptc.passes.graph.pattern import dtype
from sptc.passes.mask.bounds import EVERYWHERE

_MAX_CHOICES = 32
_ROUNDING = 2**-6  # relative, twice that of bf16: nearer fractions may be equal in the program, or not


class Unreadable(Exception):
    """A value that terms can't express; the reader then keeps the tensor itself."""


@dataclass(frozen=True)
class SizeOf:
    """A symbolic size, equal to others by its expression; `node` computes it."""

    expression: Any
    node: Node = field(compare=False)


@dataclass(frozen=True, eq=False)
class Linear:
    """constant + sum of coefficient * atom; no coefficient is zero and no atom occurs twice.

    An atom is an Index, a Size, an Element, or a Binary of "//" or "%" whose right side is a positive Literal.
    """

    constant: int | float = 0
    terms: tuple[tuple[Expression, int | float], ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Linear) and self.constant == other.constant and frozenset(self.terms) == frozenset(other.terms)

    def __hash__(self) -> int:
        return hash((self.constant, frozenset(self.terms)))

    @property
    def is_constant(self) -> bool:
        return not self.terms

    @property
    def atom(self) -> Expression | None:
        """The atom, if this is nothing but one."""
        return self.terms[0][0] if len(self.terms) == 1 and self.terms[0][1] == 1 and self.constant == 0 else None

    def tree(self) -> Expression:
        """The same as an expression of the language; all coefficients are integers."""
        result: Expression | None = None
        for atom, c in self.terms:
            term = atom if abs(c) == 1 else Binary("*", Literal(abs(int(c))), atom)
            if result is None:
                result = term if c > 0 else Binary("-", Literal(0), term)
            else:
                result = Binary("+" if c > 0 else "-", result, term)
        constant = int(self.constant)
        if result is None or constant == 0:
            return result or Literal(constant)
        return Binary("+" if constant > 0 else "-", result, Literal(abs(constant)))


@dataclass(frozen=True)
class Cases:
    """`then` where `condition` holds, else `other`."""

    condition: Truth
    then: Number
    other: Number


Number = Linear | Cases
Truth = bool | Expression
Term = Number | Truth

ZERO = Linear(0)
ONE = Linear(1)


def linear(atom: Expression) -> Linear:
    return Linear(0, ((atom, 1),))


def element_of(node: Node, at: tuple[Linear, ...]) -> Element:
    return Element(node, tuple(index.tree() for index in at))


def boolean(element: Element) -> bool:
    return dtype(element.position) == torch.bool


def floating(element: Element) -> bool:
    kind = dtype(element.position)
    return kind is not None and kind.is_floating_point


def linear_of(tree: Expression) -> Linear:
    """A number of the language as a sum."""
    match tree:
        case Literal(value):
            return Linear(int(value))
        case Binary("+", left, right):
            return _sum(linear_of(left), linear_of(right))
        case Binary("-", left, right):
            return _sum(linear_of(left), _product(Linear(-1), linear_of(right)))
        case Binary("*", Literal(c), atom):
            return Linear(0, ((atom, int(c)),))
    return linear(tree)


# numbers


def _combine(f: Callable[[Linear, Linear], Number], a: Number, b: Number) -> Number:
    """`f` under the choices of both."""
    if isinstance(a, Cases):
        if isinstance(b, Cases) and b.condition == a.condition:
            return choose(a.condition, _combine(f, a.then, b.then), _combine(f, a.other, b.other))
        return choose(a.condition, _combine(f, a.then, b), _combine(f, a.other, b))
    if isinstance(b, Cases):
        return choose(b.condition, _combine(f, a, b.then), _combine(f, a, b.other))
    return f(a, b)


def _choices(a: Number) -> int:
    return 1 + _choices(a.then) + _choices(a.other) if isinstance(a, Cases) else 0


def _sum(a: Linear, b: Linear) -> Linear:
    coefficients = dict(a.terms)
    for atom, c in b.terms:
        coefficients[atom] = coefficients.get(atom, 0) + c
    return Linear(a.constant + b.constant, tuple((atom, c) for atom, c in coefficients.items() if c != 0))


def _product(a: Linear, b: Linear) -> Linear:
    if not a.is_constant:
        a, b = b, a
    if not a.is_constant:
        raise Unreadable("a product of two variables")
    factor = a.constant
    if factor == 0 and b.terms:
        return Linear(b.constant * factor)
    return Linear(b.constant * factor, tuple((atom, c * factor) for atom, c in b.terms))


def add(a: Number, b: Number) -> Number:
    return _combine(_sum, a, b)


def multiply(a: Number, b: Number) -> Number:
    return _combine(_product, a, b)


def negate(a: Number) -> Number:
    return multiply(Linear(-1), a)


def subtract(a: Number, b: Number) -> Number:
    return add(a, negate(b))


def absolute(a: Number) -> Number:
    return choose(compare(">=", a, ZERO), a, negate(a))


def _split(a: Linear, divisor: int) -> tuple[Linear, Linear]:
    """(multiple, rest) with a == divisor * multiple + rest, taking all terms whose coefficient `divisor` divides."""
    whole = all(_finite_integer(c) for c in (a.constant, *(c for _, c in a.terms)))
    if divisor <= 0 or not whole or any(isinstance(atom, Element) and floating(atom) for atom, _ in a.terms):
        raise Unreadable("a quotient of what is not an integer")
    high = tuple((atom, int(c) // divisor) for atom, c in a.terms if c % divisor == 0)
    low = tuple((atom, c) for atom, c in a.terms if c % divisor)
    return Linear(int(a.constant) // divisor, high), Linear(int(a.constant) % divisor, low)


def floor_divide(a: Number, divisor: int) -> Number:
    def divide(x: Linear, _: Linear) -> Number:
        high, low = _split(x, divisor)
        least, most = bounds(low)
        if least >= 0 and most < divisor:
            return high
        return _sum(high, linear(Binary("//", low.tree(), Literal(divisor))))

    return _combine(divide, a, ZERO)


def remainder(a: Number, divisor: int) -> Number:
    def rest(x: Linear, _: Linear) -> Number:
        _, low = _split(x, divisor)
        least, most = bounds(low)
        if least >= 0 and most < divisor:
            return low
        return linear(Binary("%", low.tree(), Literal(divisor)))

    return _combine(rest, a, ZERO)


def choose(condition: Truth, then: Number, other: Number) -> Number:
    """`then` where `condition` holds, else `other`."""
    if isinstance(condition, bool):
        return then if condition else other
    if then == other:
        return then
    first = _only_first(condition)
    if first is not None and isinstance(other, Linear) and _at_zero(other, first) == then:
        return other
    choice = Cases(condition, then, other)
    if _choices(choice) > _MAX_CHOICES:
        raise Unreadable("too many cases")
    return choice


def _only_first(condition: Truth) -> Index | None:
    """i, if the condition is i <= 0: then i is 0 where it holds."""
    match condition:
        case Binary("<=", Index() as index, Literal(0)):
            return index
    return None


def _at_zero(value: Linear, index: Index) -> Linear | None:
    if any(not isinstance(atom, Index) for atom, _ in value.terms):
        return None
    return Linear(value.constant, tuple((atom, c) for atom, c in value.terms if atom != index))


def bounds(a: Number) -> tuple[int, int]:
    """The least and greatest value, inclusive. Coefficients are integers."""
    if isinstance(a, Cases):
        return min(bounds(a.then)[0], bounds(a.other)[0]), max(bounds(a.then)[1], bounds(a.other)[1])
    interval = EVERYWHERE.number(a.tree())
    assert interval is not None  # divisors are positive literals
    return interval.low, interval.high


def _finite_integer(x: int | float) -> bool:
    return math.isfinite(x) and x == int(x)


# truths


def compare(operator: str, a: Number, b: Number) -> Truth:
    """a OPERATOR b, for one of < <= > >= == !=.

    Raises:
        Unreadable: for values that are not integers.
    """
    size = _absolute_operand(a)
    if size is not None and isinstance(b, Linear) and operator in ("<", "<=", ">", ">="):
        sides = compare(operator, size, b), compare(operator, negate(size), b)
        return conjunction(*sides) if operator in ("<", "<=") else disjunction(*sides)
    if isinstance(a, Cases):
        return select(a.condition, compare(operator, a.then, b), compare(operator, a.other, b))
    if isinstance(b, Cases):
        return select(b.condition, compare(operator, a, b.then), compare(operator, a, b.other))
    if a.is_constant and b.is_constant:
        fractions = any(math.isfinite(x.constant) and x.constant != int(x.constant) for x in (a, b))
        if fractions and math.isclose(a.constant, b.constant, rel_tol=_ROUNDING):
            raise Unreadable("constants that a dtype may round apart, or together")
        return bool(OPERATORS[operator](a.constant, b.constant))
    difference = subtract(a, b)
    assert isinstance(difference, Linear)
    if not all(_finite_integer(c) for c in (difference.constant, *(c for _, c in difference.terms))) or any(
        isinstance(atom, Element) and (floating(atom) or boolean(atom)) for atom, _ in difference.terms
    ):
        raise Unreadable("a comparison of what is not an integer")
    comparison = _comparison(operator, difference)
    settled = EVERYWHERE.truth(comparison)
    return True if settled.certain else False if settled.nowhere else comparison


def _comparison(operator: str, value: Linear) -> Binary:
    """value OPERATOR 0: terms with a plus to the left, those with a minus and the constant to the right.

    x < 1 is written as x <= 0 and so on, where that saves the constant.
    """
    shorter = {("<", -1): "<=", (">", 1): ">=", ("<=", 1): "<", (">=", -1): ">"}.get((operator, int(value.constant)))
    if shorter is not None:
        operator, value = shorter, Linear(0, value.terms)
    left = Linear(0, tuple((atom, c) for atom, c in value.terms if c > 0))
    right = Linear(-value.constant, tuple((atom, -c) for atom, c in value.terms if c < 0))
    if left.terms:
        return Binary(operator, left.tree(), right.tree())
    return Binary(MIRROR.get(operator, operator), Linear(0, right.terms).tree(), Literal(-int(right.constant)))


def _absolute_operand(a: Number) -> Number | None:
    """x, if `a` is |x|."""
    if isinstance(a, Cases) and isinstance(a.then, Linear) and a.other == negate(a.then) and a.condition == _comparison(">=", a.then):
        return a.then
    return None


def negation(a: Truth) -> Truth:
    return not a if isinstance(a, bool) else negated(a)


def conjunction(*truths: Truth) -> Truth:
    return _joined("&", truths, neutral=True)


def disjunction(*truths: Truth) -> Truth:
    return _joined("|", truths, neutral=False)


def _joined(operator: str, truths: tuple[Truth, ...], neutral: bool) -> Truth:
    kept: dict[Expression, None] = {}
    for truth in truths:
        if isinstance(truth, bool):
            if truth is not neutral:
                return truth
        else:
            kept.update(dict.fromkeys(operands(truth, operator)))
    if any(negated(t) in kept for t in kept if not isinstance(t, Binary) or not t.logical):
        return not neutral
    return functools.reduce(lambda left, right: Binary(operator, left, right), kept) if kept else neutral


def select(condition: Truth, then: Truth, other: Truth) -> Truth:
    """`then` where `condition` holds, else `other`."""
    if then == other:
        return then
    if then is True:
        return disjunction(condition, other)
    if then is False:
        return conjunction(negation(condition), other)
    if other is True:
        return disjunction(negation(condition), then)
    if other is False:
        return conjunction(condition, then)
    return disjunction(conjunction(condition, then), conjunction(negation(condition), other))


def as_number(term: Term) -> Number:
    """True is 1 and False 0."""
    return term if isinstance(term, Linear | Cases) else choose(term, ONE, ZERO)


def as_truth(term: Term) -> Truth:
    """Whether a number is not zero."""
    return compare("!=", term, ZERO) if isinstance(term, Linear | Cases) else term


def conjuncts(truth: Truth) -> tuple[Truth, ...]:
    """The truths of which `truth` is the conjunction; () for True."""
    return (() if truth else (truth,)) if isinstance(truth, bool) else tuple(operands(truth, "&"))


def atoms(term: Term) -> Iterator[Expression]:
    """Every atom in `term`, those inside indices included."""
    match term:
        case bool():
            return
        case Linear(_, terms):
            trees = [atom for atom, _ in terms]
        case Cases(condition, then, other):
            for part in (condition, then, other):
                yield from atoms(part)
            return
        case _:
            trees = [term]
    for node in (node for tree in trees for node in walk(tree)):
        if isinstance(node, Index | Size | Element) or (isinstance(node, Binary) and node.operator in ("//", "%")):
            yield node
