"""What can be said of a condition for whole ranges of positions at once: interval arithmetic, once for all that it is done with.

`Intervals` knows the rules; what bounds are made of is for its subclasses to say: tensors with one element a range (`OverRanges`), numbers
while a mask is read (`passes/mask/terms.py`), texts of a kernel (`codegen/triton/source/predicate.py`). All that is asked of bounds is
Python's operators: + - * // %, comparisons, and & | of what these give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sptc.ir.condition import MIRROR, OPERATORS, Binary, Element, Expression, Index, Literal, Not, PredicateError, Size, walk

T = TypeVar("T", bound=Any)


@dataclass(frozen=True)
class Interval(Generic[T]):
    """The least and the greatest value, and what must be true for them to be right."""

    low: T
    high: T
    given: tuple[T, ...] = ()

    @property
    def exact(self) -> bool:
        return self.low is self.high


@dataclass(frozen=True)
class Truth(Generic[T]):
    """It certainly holds everywhere in the ranges; it certainly holds nowhere."""

    certain: T
    nowhere: T


class Intervals(ABC, Generic[T]):
    """The rules. A subclass says what bounds are."""

    @abstractmethod
    def constant(self, value: int | bool) -> T: ...

    @abstractmethod
    def leaf(self, tree: Expression) -> Interval[T]:
        """The bounds of an index, a size or an element."""

    @abstractmethod
    def positive(self, value: T) -> T | None:
        """The condition that a divisor is above 0; None where it is not."""

    @abstractmethod
    def remainders(self, low: T, high: T, divisor: T) -> tuple[T, T]:
        """The bounds of low % divisor to high % divisor."""

    def extremes(self, values: Sequence[T]) -> tuple[T, T]:
        return min(values), max(values)

    def flag(self, tree: Element) -> Truth[T]:
        """An element where a condition stands."""
        return Truth(self.constant(False), self.constant(False))

    def sign(self, value: T) -> int | None:
        """A number that is negative where `value` is; None where there is no telling."""
        return None

    def truth(self, tree: Expression) -> Truth[T]:
        match tree:
            case Literal(value):
                return Truth(self.constant(bool(value)), self.constant(not value))
            case Element():
                return self.flag(tree)
            case Not(operand):
                return _not(self.truth(operand))
            case Binary("&", left, right):
                a, b = self.truth(left), self.truth(right)
                return Truth(a.certain & b.certain, a.nowhere | b.nowhere)
            case Binary("|", left, right):
                a, b = self.truth(left), self.truth(right)
                return Truth(a.certain | b.certain, a.nowhere & b.nowhere)
            case Binary(operator, left, right):
                return self._comparison(operator, self.number(left), self.number(right))
        raise AssertionError(f"{tree} is no condition: parse() lets none through")

    def _comparison(self, operator: str, a: Interval[T] | None, b: Interval[T] | None) -> Truth[T]:
        if a is None or b is None:
            return Truth(self.constant(False), self.constant(False))
        if operator == "!=":
            return _not(self._comparison("==", a, b))
        if operator in (">", ">="):
            return self._comparison(MIRROR[operator], b, a)
        if operator == "<=":
            certain, nowhere = a.high <= b.low, a.low > b.high
        elif operator == "<":
            certain, nowhere = a.high < b.low, a.low >= b.high
        else:
            certain, nowhere = (a.high <= b.low) & (a.low >= b.high), (a.high < b.low) | (a.low > b.high)
        for condition in dict.fromkeys((*a.given, *b.given)):
            certain, nowhere = certain & condition, nowhere & condition
        return Truth(certain, nowhere)

    def number(self, tree: Expression) -> Interval[T] | None:
        match tree:
            case Literal(value):
                constant = self.constant(int(value))
                return Interval(constant, constant)
            case Binary(operator, left, right):
                a, b = self.number(left), self.number(right)
                return None if a is None or b is None else self._arithmetic(operator, a, b)
        return self.leaf(tree)

    def _arithmetic(self, operator: str, a: Interval[T], b: Interval[T]) -> Interval[T] | None:
        given = (*a.given, *b.given)
        if operator in "+-*":
            if a.exact and b.exact:
                value = OPERATORS[operator](a.low, b.low)
                return Interval(value, value, given)
            if operator == "+":
                return Interval(a.low + b.low, a.high + b.high, given)
            if operator == "-":
                return Interval(a.low - b.high, a.high - b.low, given)
            return self._product(a, b, given)
        divides = self.positive(b.low) if b.exact else None
        if divides is None:
            return None
        given = (*given, divides)
        if a.exact:
            value = OPERATORS[operator](a.low, b.low)
            return Interval(value, value, given)
        if operator == "//":
            return Interval(a.low // b.low, a.high // b.low, given)
        return Interval(*self.remainders(a.low, a.high, b.low), given)

    def _product(self, a: Interval[T], b: Interval[T], given: tuple[T, ...]) -> Interval[T]:
        if a.exact:
            a, b = b, a
        sign = self.sign(b.low) if b.exact else None
        if sign is not None:
            low, high = (a.low, a.high) if sign >= 0 else (a.high, a.low)
            return Interval(low * b.low, high * b.low, given)
        products = [x * y for x in (a.low, a.high) for y in ((b.low,) if b.exact else (b.low, b.high))]
        return Interval(*self.extremes(products), given)


def _not(truth: Truth[T]) -> Truth[T]:
    return Truth(truth.nowhere, truth.certain)


def tight(tree: Expression) -> bool:
    """Whether `nowhere` is exact.

    It is where each of q and k occurs once and moves its side of one comparison monotonically: both sides reach their extremes together.
    """
    match tree:
        case Literal():
            return True
        case Element(_, indices):
            return all(not isinstance(i, Binary | Element) for i in indices) and _single_use(tree)
        case Not(operand):
            return isinstance(operand, Element) and tight(operand)
        case Binary("|", left, right):
            return tight(left) and tight(right)
        case Binary(operator, left, right) if operator in MIRROR:
            return _single_use(tree) and _monotone(left) and _monotone(right)
        case Binary("==", left, right):
            return _single_use(tree) and _monotone(left) and _monotone(right) and not any(isinstance(n, Element) for n in walk(tree))
    return False


def _single_use(tree: Expression) -> bool:
    used = [node.name for node in walk(tree) if isinstance(node, Index) and node.name in "qk"]
    return len(used) == len(set(used))


def _monotone(tree: Expression) -> bool:
    match tree:
        case Binary(operator, left, right):
            return operator in "+-" and _monotone(left) and _monotone(right)
        case Element(_, indices):
            return all(not isinstance(i, Binary | Element) for i in indices)
    return True


@dataclass(frozen=True)
class Ranges:
    """Positions taken by ranges of queries and keys, for `Predicate.bounds`.

    b and h hold positions; q holds numbers of ranges, number i being [i * q_step, min((i + 1) * q_step, q_size)); so does k.
    The four broadcast together.
    """

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor
    q_step: int
    k_step: int
    q_size: int
    k_size: int


@dataclass(frozen=True)
class OverRanges(Intervals[Tensor]):
    """Bounds over ranges of queries and keys: tensors that broadcast to all of them."""

    ranges: Ranges
    tensors: Sequence[Tensor]
    sizes: Sequence[int]

    def constant(self, value: int | bool) -> Tensor:
        return torch.tensor(value, device=self.ranges.q.device)

    def leaf(self, tree: Expression) -> Interval[Tensor]:
        r = self.ranges
        match tree:
            case Index("q"):
                return Interval(r.q * r.q_step, ((r.q + 1) * r.q_step).clamp(max=r.q_size) - 1)
            case Index("k"):
                return Interval(r.k * r.k_step, ((r.k + 1) * r.k_step).clamp(max=r.k_size) - 1)
            case Index(name):
                return Interval(r.b, r.b) if name == "b" else Interval(r.h, r.h)
            case Size(position):
                size = self.constant(int(self.sizes[position]))
                return Interval(size, size)
            case Element(position):
                return self._element(tree, self.tensors[position])
        raise AssertionError(f"{tree} is no number: parse() lets none through")

    def flag(self, tree: Element) -> Truth[Tensor]:
        shown = self._element(tree, self.tensors[tree.position].ne(0).to(torch.int8))
        return Truth(shown.low.bool(), ~shown.high.bool())

    def positive(self, value: Tensor) -> Tensor | None:
        return self.constant(True) if bool((value > 0).all()) else None

    def extremes(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        stacked = torch.stack(torch.broadcast_tensors(*values))
        return stacked.amin(0), stacked.amax(0)

    def remainders(self, low: Tensor, high: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
        same = low // divisor == high // divisor
        return torch.where(same, low % divisor, 0), torch.where(same, high % divisor, divisor - 1)

    def _element(self, tree: Element, values: Tensor) -> Interval[Tensor]:
        """Least and greatest element that the indices reach: exact where they are plain names, that of the whole axis elsewhere."""
        r, low, high = self.ranges, values, values
        picks: list[Tensor] = []
        for axis, index in enumerate(tree.indices):
            if isinstance(index, Index) and index.name in "qk":
                numbers, step, size = (r.q, r.q_step, r.q_size) if index.name == "q" else (r.k, r.k_step, r.k_size)
                if values.shape[axis] < size:
                    raise PredicateError(
                        f"t{tree.position} has {values.shape[axis]} elements along axis {axis}, fewer than {index.name} takes ({size})"
                    )
                low = _reduced(low.narrow(axis, 0, size), axis, step, torch.amin)
                high = _reduced(high.narrow(axis, 0, size), axis, step, torch.amax)
                picks.append(numbers)
                continue
            interval = self.number(index)
            if interval is not None and bool((interval.low == interval.high).all()):
                picks.append(interval.low)
            else:
                low, high = low.amin(axis, keepdim=True), high.amax(axis, keepdim=True)
                picks.append(torch.zeros((), dtype=torch.int64, device=values.device))
        return Interval(widened(low[tuple(picks)]), widened(high[tuple(picks)]))


def widened(values: Tensor) -> Tensor:
    """`values`, int64 if they are narrower integers: arithmetic with them must not wrap around, and none but int64 is an index."""
    return values if values.dtype == torch.bool or values.dtype.is_floating_point else values.long()


def _reduced(values: Tensor, axis: int, step: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce each run of `step` elements along `axis`; the last run may be shorter."""
    if step == 1 or not values.shape[axis]:
        return values
    whole = values.shape[axis] // step * step
    parts = [reduce(values.narrow(axis, 0, whole).unflatten(axis, (-1, step)), dim=axis + 1)] if whole else []
    if whole < values.shape[axis]:
        parts.append(reduce(values.narrow(axis, whole, values.shape[axis] - whole), dim=axis, keepdim=True))
    return torch.cat(parts, axis)
