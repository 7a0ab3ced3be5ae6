"""Terms of the mask reader: what one element of a mask is, as a function of its indices.

A number is a `Linear` combination of indices, sizes and tensor elements, or a `Choice` between two numbers; a truth is a comparison of a
Linear with zero, an element of a bool tensor, or a combination of those. The functions below build terms and simplify as they build:
linear parts cancel, comparisons that hold for every position become True, choices between equal values disappear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from sptc.passes.graph.pattern import dtype

_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
_MAX_CHOICES = 32


class Unreadable(Exception):
    """A value that terms can't express; the reader then keeps the tensor itself."""


@dataclass(frozen=True)
class Index:
    """b, h, q or k, in [0, limit)."""

    name: str
    limit: int | None  # None: symbolic


@dataclass(frozen=True)
class Size:
    """A symbolic size, equal to others by its expression; `node` computes it."""

    expression: Any
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Element:
    """One element of a tensor that a graph node holds."""

    node: Node
    at: tuple[Linear, ...]

    @property
    def boolean(self) -> bool:
        return dtype(self.node) == torch.bool

    @property
    def floating(self) -> bool:
        kind = dtype(self.node)
        return kind is not None and kind.is_floating_point


@dataclass(frozen=True)
class Quotient:
    """value // divisor, rounded down."""

    value: Linear
    divisor: int


@dataclass(frozen=True)
class Remainder:
    """value % divisor, in [0, divisor)."""

    value: Linear
    divisor: int


Atom = Index | Size | Element | Quotient | Remainder


@dataclass(frozen=True, eq=False)
class Linear:
    """constant + sum of coefficient * atom; no coefficient is zero and no atom occurs twice."""

    constant: int | float = 0
    terms: tuple[tuple[Atom, int | float], ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Linear) and self.constant == other.constant and frozenset(self.terms) == frozenset(other.terms)

    def __hash__(self) -> int:
        return hash((self.constant, frozenset(self.terms)))

    @property
    def is_constant(self) -> bool:
        return not self.terms

    @property
    def atom(self) -> Atom | None:
        """The atom, if this is nothing but one."""
        return self.terms[0][0] if len(self.terms) == 1 and self.terms[0][1] == 1 and self.constant == 0 else None


@dataclass(frozen=True)
class Choice:
    """`then` where `condition` holds, else `other`."""

    condition: Truth
    then: Number
    other: Number


@dataclass(frozen=True)
class Comparison:
    """value OP 0, over integers."""

    operator: str
    value: Linear


@dataclass(frozen=True)
class Not:
    operand: Truth


@dataclass(frozen=True)
class All:
    """The conjunction of two or more."""

    operands: tuple[Truth, ...]


@dataclass(frozen=True)
class AnyOf:
    """The disjunction of two or more."""

    operands: tuple[Truth, ...]


Number = Linear | Choice
Truth = bool | Comparison | Element | Not | All | AnyOf
Term = Number | Truth

ZERO = Linear(0)
ONE = Linear(1)


def linear(atom: Atom) -> Linear:
    return Linear(0, ((atom, 1),))


# numbers


def _combine(f: Callable[[Linear, Linear], Number], a: Number, b: Number) -> Number:
    """`f` under the choices of both."""
    if isinstance(a, Choice):
        if isinstance(b, Choice) and b.condition == a.condition:
            return choose(a.condition, _combine(f, a.then, b.then), _combine(f, a.other, b.other))
        return choose(a.condition, _combine(f, a.then, b), _combine(f, a.other, b))
    if isinstance(b, Choice):
        return choose(b.condition, _combine(f, a, b.then), _combine(f, a, b.other))
    return f(a, b)


def _choices(a: Number) -> int:
    return 1 + _choices(a.then) + _choices(a.other) if isinstance(a, Choice) else 0


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
    if divisor <= 0 or any(c != int(c) for _, c in a.terms) or not _finite_integer(a.constant):
        raise Unreadable("a quotient of what is not an integer")
    high = tuple((atom, int(c) // divisor) for atom, c in a.terms if c % divisor == 0)
    low = tuple((atom, c) for atom, c in a.terms if c % divisor)
    return Linear(int(a.constant) // divisor, high), Linear(int(a.constant) % divisor, low)


def floor_divide(a: Number, divisor: int) -> Number:
    def divide(x: Linear, _: Linear) -> Number:
        high, low = _split(x, divisor)
        least, most = bounds(low)
        if least is not None and most is not None and least >= 0 and most < divisor:
            return high
        return _sum(high, linear(Quotient(low, divisor)))

    return _combine(divide, a, ZERO)


def remainder(a: Number, divisor: int) -> Number:
    def rest(x: Linear, _: Linear) -> Number:
        _, low = _split(x, divisor)
        least, most = bounds(low)
        if least is not None and most is not None and least >= 0 and most < divisor:
            return low
        return linear(Remainder(low, divisor))

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
    choice = Choice(condition, then, other)
    if _choices(choice) > _MAX_CHOICES:
        raise Unreadable("too many cases")
    return choice


def _only_first(condition: Truth) -> Index | None:
    """i, if the condition is i <= 0: then i is 0 where it holds."""
    if isinstance(condition, Comparison) and condition.operator == "<=" and isinstance(condition.value.atom, Index):
        return condition.value.atom
    return None


def _at_zero(value: Linear, index: Index) -> Linear | None:
    if any(not isinstance(atom, Index) for atom, _ in value.terms):
        return None
    return Linear(value.constant, tuple((atom, c) for atom, c in value.terms if atom != index))


def bounds(a: Linear) -> tuple[int | float | None, int | float | None]:
    """The least and greatest value, inclusive; None where unknown."""
    least: int | float | None = a.constant
    most: int | float | None = a.constant
    for atom, c in a.terms:
        low, high = _atom_bounds(atom)
        if c < 0:
            low, high = high, low
        least = None if least is None or low is None else least + c * low
        most = None if most is None or high is None else most + c * high
    return least, most


def _atom_bounds(atom: Atom) -> tuple[int | float | None, int | float | None]:
    match atom:
        case Index(_, limit):
            return 0, None if limit is None else limit - 1
        case Size():
            return 0, None
        case Remainder(_, divisor):
            return 0, divisor - 1
        case Quotient(value, divisor):
            least, most = bounds(value)
            return None if least is None else least // divisor, None if most is None else most // divisor
    return None, None


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
    if isinstance(a, Choice):
        return select(a.condition, compare(operator, a.then, b), compare(operator, a.other, b))
    if isinstance(b, Choice):
        return select(b.condition, compare(operator, a, b.then), compare(operator, a, b.other))
    if a.is_constant and b.is_constant:
        return _COMPARE[operator](a.constant, b.constant)
    difference = subtract(a, b)
    assert isinstance(difference, Linear)
    if not all(_finite_integer(c) for c in (difference.constant, *(c for _, c in difference.terms))) or any(
        isinstance(atom, Element) and (atom.floating or atom.boolean) for atom, _ in difference.terms
    ):
        raise Unreadable("a comparison of what is not an integer")
    return _settled(_comparison(operator, difference))


def _comparison(operator: str, value: Linear) -> Comparison:
    """value OPERATOR 0; x < 1 is written as x <= 0 and so on, where that saves the constant."""
    loose = {"<": ("<=", -1), ">": (">=", 1)}.get(operator)
    if loose is not None and value.constant == loose[1]:
        return Comparison(loose[0], Linear(0, value.terms))
    strict = {"<=": ("<", 1), ">=": (">", -1)}.get(operator)
    if strict is not None and value.constant == strict[1]:
        return Comparison(strict[0], Linear(0, value.terms))
    return Comparison(operator, value)


def _settled(comparison: Comparison) -> Truth:
    """True or False if the bounds of its value decide, else the comparison."""
    operator, (least, most) = comparison.operator, bounds(comparison.value)
    if comparison.value.is_constant:
        return _COMPARE[operator](comparison.value.constant, 0)
    if operator in (">", ">=") and least is not None and _COMPARE[operator](least, 0):
        return True
    if operator in ("<", "<=") and most is not None and _COMPARE[operator](most, 0):
        return True
    if operator in (">", ">=") and most is not None and not _COMPARE[operator](most, 0):
        return False
    if operator in ("<", "<=") and least is not None and not _COMPARE[operator](least, 0):
        return False
    if operator in ("==", "!=") and ((least is not None and least > 0) or (most is not None and most < 0)):
        return operator == "!="
    return comparison


def _absolute_operand(a: Number) -> Number | None:
    """x, if `a` is |x|."""
    if isinstance(a, Choice) and isinstance(a.then, Linear) and a.other == negate(a.then) and a.condition == Comparison(">=", a.then):
        return a.then
    return None


def negation(a: Truth) -> Truth:
    match a:
        case bool():
            return not a
        case Comparison(operator, value):
            return _comparison(_NEGATED[operator], value)
        case Not(operand):
            return operand
        case All(operands):
            return disjunction(*map(negation, operands))
        case AnyOf(operands):
            return conjunction(*map(negation, operands))
    return Not(a)


def conjunction(*truths: Truth) -> Truth:
    kept = _flat(truths, All, skip=True)
    if False in kept or any(negation(t) in kept for t in kept if isinstance(t, Comparison | Element | Not)):
        return False
    return All(kept) if len(kept) > 1 else kept[0] if kept else True


def disjunction(*truths: Truth) -> Truth:
    kept = _flat(truths, AnyOf, skip=False)
    if True in kept or any(negation(t) in kept for t in kept if isinstance(t, Comparison | Element | Not)):
        return True
    return AnyOf(kept) if len(kept) > 1 else kept[0] if kept else False


def _flat(truths: tuple[Truth, ...], kind: type[All] | type[AnyOf], skip: bool) -> tuple[Truth, ...]:
    flat = [inner for t in truths for inner in (t.operands if isinstance(t, kind) else (t,))]
    return tuple(dict.fromkeys(t for t in flat if t is not skip))


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
    return term if isinstance(term, Linear | Choice) else choose(term, ONE, ZERO)


def as_truth(term: Term) -> Truth:
    """Whether a number is not zero."""
    return compare("!=", term, ZERO) if isinstance(term, Linear | Choice) else term


def conjuncts(truth: Truth) -> tuple[Truth, ...]:
    """The truths of which `truth` is the conjunction; () for True."""
    return truth.operands if isinstance(truth, All) else () if truth is True else (truth,)


def atoms(term: Term) -> Iterator[Atom]:
    """Every atom in `term`, those inside indices included."""
    match term:
        case Linear(_, terms):
            for atom, _ in terms:
                yield from _atoms_of(atom)
        case Choice(condition, then, other):
            for part in (condition, then, other):
                yield from atoms(part)
        case Comparison(_, value):
            yield from atoms(value)
        case Element():
            yield from _atoms_of(term)
        case Not(operand):
            yield from atoms(operand)
        case All(operands) | AnyOf(operands):
            for operand in operands:
                yield from atoms(operand)


def _atoms_of(atom: Atom) -> Iterator[Atom]:
    yield atom
    match atom:
        case Element(_, at):
            for index in at:
                yield from atoms(index)
        case Quotient(value) | Remainder(value):
            yield from atoms(value)
