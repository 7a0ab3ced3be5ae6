"""Mask predicates: which (b, h, q, k) may attend, as a string in a small grammar.

The grammar is a subset of Python expressions, parsed by `ast` and never evaluated by Python:

    names        b h q k                 batch, query head, query position, key position (integers)
                 s0 s1 ...               integer sizes, given beside the string
                 t0[i, j] t1[i] ...      elements of tensors given beside the string; indices are integer expressions
    literals     integers, True, False
    arithmetic   + - * // %
    comparisons  < <= > >= == !=         two operands
    logic        & | ~                   on booleans

As in Python, `&` and `|` bind tighter than comparisons, so comparisons stand in parentheses. `//` and `%` round down. An element
of a tensor that is not boolean counts as True where a boolean stands if it is not zero.

A predicate can be evaluated element by element, or over whole ranges of queries and keys at once (`bounds`): interval arithmetic
tells in which ranges it holds everywhere and in which nowhere, so that most elements need not be looked at.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

INDICES = ("b", "h", "q", "k")
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%"}
_LOGIC = {ast.BitAnd: "&", ast.BitOr: "|"}
_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
_APPLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "//": functools.partial(torch.div, rounding_mode="floor"),
    "%": torch.remainder,
    "<": torch.lt,
    "<=": torch.le,
    ">": torch.gt,
    ">=": torch.ge,
    "==": torch.eq,
    "!=": torch.ne,
    "&": torch.logical_and,
    "|": torch.logical_or,
}
MIRROR = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}  # with the sides exchanged
OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}  # what holds where it does not


class PredicateError(ValueError):
    """A predicate is malformed, or does not fit the tensors and sizes given with it."""


@dataclass(frozen=True)
class Literal:
    value: int | bool


@dataclass(frozen=True)
class Index:
    name: str  # b, h, q or k
    limit: int | None = field(default=None, compare=False)  # it is below this, where that is known


@dataclass(frozen=True)
class Size:
    position: Any  # an integer; while a mask is read, what the size is


@dataclass(frozen=True)
class Element:
    position: Any  # an integer; while a mask is read, the graph's node
    indices: tuple[Expression, ...]


@dataclass(frozen=True)
class Not:
    operand: Expression


@dataclass(frozen=True)
class Binary:
    operator: str
    left: Expression
    right: Expression

    @property
    def logical(self) -> bool:
        return self.operator in "&|"


Expression = Literal | Index | Size | Element | Not | Binary


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
class Predicate:
    """A checked predicate. `str(predicate)` is its canonical text."""

    tree: Expression

    def __str__(self) -> str:
        return _text(self.tree)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Index names in use: a subset of {"b", "h", "q", "k"}."""
        return frozenset(node.name for node in walk(self.tree) if isinstance(node, Index))

    @functools.cached_property
    def conjuncts(self) -> tuple[Predicate, ...]:
        """The predicates of which this one is the conjunction; empty for "True"."""
        return tuple(Predicate(tree) for tree in operands(self.tree, "&") if tree != Literal(True))

    @functools.cached_property
    def elements(self) -> tuple[Element, ...]:
        """Every reading of an element, those inside indices of others included."""
        return tuple(node for node in walk(self.tree) if isinstance(node, Element))

    @functools.cached_property
    def tensor_count(self) -> int:
        """How many tensors must be given: one more than the highest t."""
        return max((node.position + 1 for node in walk(self.tree) if isinstance(node, Element)), default=0)

    @functools.cached_property
    def size_count(self) -> int:
        """How many sizes must be given: one more than the highest s."""
        return max((node.position + 1 for node in walk(self.tree) if isinstance(node, Size)), default=0)

    def uses(self, name: str) -> bool:
        """Whether the index `name` ("b", "h", "q" or "k") occurs."""
        return name in self.names

    def check(self, tensors: Sequence[Tensor], sizes: Sequence[int | torch.SymInt]) -> None:
        """Raise PredicateError unless `tensors` and `sizes` cover what the predicate names, with the right number of indices."""
        for node in walk(self.tree):
            if isinstance(node, Size) and node.position >= len(sizes):
                raise PredicateError(f"predicate {self!s} names s{node.position}, but {len(sizes)} sizes were given")
            if isinstance(node, Element):
                if node.position >= len(tensors):
                    raise PredicateError(f"predicate {self!s} names t{node.position}, but {len(tensors)} tensors were given")
                if tensors[node.position].dim() != len(node.indices):
                    shape = list(tensors[node.position].shape)
                    raise PredicateError(f"predicate {self!s} gives t{node.position} {len(node.indices)} indices; its shape is {shape}")

    def evaluate(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """The predicate at int64 positions that broadcast together: bool, of the shape to which the names in use broadcast.

        Positions must lie inside the tensors they index.
        """
        self.check(tensors, sizes)
        names = {"b": b, "h": h, "q": q, "k": k}
        return _truth(_evaluate(self.tree, names, tensors, sizes, q.device))

    @functools.cached_property
    def tight(self) -> bool:
        """Whether the first result of `bounds` is exact: where it is True, some (q, k) of the ranges satisfies the predicate."""
        return _tight(self.tree)

    def bounds(self, ranges: Ranges, tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(possible, certain), bool, broadcast from `ranges`: where not possible it holds for none of them, where certain for all."""
        self.check(tensors, sizes)
        return _bool_bounds(self.tree, ranges, tensors, sizes)


TRUE = Predicate(Literal(True))


def conjunction(parts: Sequence[Predicate]) -> Predicate:
    """The predicate that holds where all of `parts` do."""
    return Predicate(functools.reduce(lambda left, right: Binary("&", left, right), [part.tree for part in parts])) if parts else TRUE


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Predicate:
    """The checked predicate that `text` spells.

    Raises:
        PredicateError: with the column of what does not fit the grammar.
    """
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        column = f" at column {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise PredicateError(f"predicate {text!r} does not parse{column}: {error}") from error
    tree = _Builder(text.strip()).build(body)
    if not _is_boolean(tree):
        raise PredicateError(f"predicate {text!r} is a number, not a condition")
    return Predicate(tree)


@dataclass(frozen=True)
class _Builder:
    """Turns Python's tree into ours, refusing all that the grammar lacks and numbers where conditions belong (and the reverse)."""

    source: str

    def build(self, node: ast.expr) -> Expression:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):  # bools are ints
            return Literal(node.value)
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            return self._element(node, node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self._minus(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return Not(self._operand(node.operand, boolean=True))
        if isinstance(node, ast.BinOp) and type(node.op) in _LOGIC:
            return Binary(_LOGIC[type(node.op)], self._operand(node.left, boolean=True), self._operand(node.right, boolean=True))
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return Binary(_ARITHMETIC[type(node.op)], self._operand(node.left, boolean=False), self._operand(node.right, boolean=False))
        if isinstance(node, ast.Compare):
            return self._compare(node)
        raise self._error(node, f"{type(node).__name__} is not in the grammar")

    def _name(self, node: ast.Name) -> Expression:
        if node.id in INDICES:
            return Index(node.id)
        if re.fullmatch(r"s(0|[1-9]\d*)", node.id):
            return Size(int(node.id[1:]))
        hint = "; a tensor needs indices, as in t0[b, k]" if re.fullmatch(r"t\d+", node.id) else "; known: b, h, q, k, s0, s1, ..."
        raise self._error(node, f"unknown name {node.id!r}{hint}")

    def _element(self, node: ast.Subscript, value: ast.Name) -> Element:
        if not re.fullmatch(r"t(0|[1-9]\d*)", value.id):
            raise self._error(node, f"{value.id!r} cannot be indexed; tensors are t0, t1, ...")
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return Element(int(value.id[1:]), tuple(self._operand(part, boolean=False) for part in parts))

    def _minus(self, node: ast.UnaryOp) -> Expression:
        operand = self._operand(node.operand, boolean=False)
        return Literal(-operand.value) if isinstance(operand, Literal) else Binary("-", Literal(0), operand)

    def _compare(self, node: ast.Compare) -> Expression:
        if len(node.ops) != 1:
            raise self._error(node, "a comparison has two operands; join comparisons with & and parentheses")
        if type(node.ops[0]) not in _COMPARE:
            raise self._error(node, f"{type(node.ops[0]).__name__} is not in the grammar")
        return Binary(
            _COMPARE[type(node.ops[0])], self._operand(node.left, boolean=False), self._operand(node.comparators[0], boolean=False)
        )

    def _operand(self, node: ast.expr, boolean: bool) -> Expression:
        built = self.build(node)
        if isinstance(built, Element) or _is_boolean(built) == boolean:
            return built
        expected, hint = ("a condition", "; put comparisons in parentheses") if boolean else ("a number", "")
        raise self._error(node, f"expected {expected} here{hint}")

    def _error(self, node: ast.expr, message: str) -> PredicateError:
        return PredicateError(f"predicate {self.source!r}, column {node.col_offset + 1}: {message}")


def _is_boolean(tree: Expression) -> bool:
    """Whether the expression can stand as a condition (an element can, and as a number too)."""
    match tree:
        case Literal(value):
            return isinstance(value, bool)
        case Not() | Element():
            return True
        case Binary():
            return tree.logical or tree.operator in _COMPARE.values()
    return False


def _children(tree: Expression) -> tuple[Expression, ...]:
    match tree:
        case Element(_, indices):
            return indices
        case Not(operand):
            return (operand,)
        case Binary(_, left, right):
            return (left, right)
    return ()


def walk(tree: Expression) -> Iterator[Expression]:
    """`tree` and all that it is made of."""
    yield tree
    for child in _children(tree):
        yield from walk(child)


def operands(tree: Expression, operator: str) -> Iterator[Expression]:
    """What `operator` ("&" or "|") joins, from left to right; `tree` itself if it is none of it."""
    if isinstance(tree, Binary) and tree.operator == operator:
        yield from operands(tree.left, operator)
        yield from operands(tree.right, operator)
    else:
        yield tree


def negated(tree: Expression) -> Expression:
    """The condition that holds where `tree` does not, with `~` before elements only."""
    match tree:
        case Literal(value):
            return Literal(not value)
        case Not(operand):
            return positive(operand)
        case Binary("&" | "|" as operator, left, right):
            return Binary("|" if operator == "&" else "&", negated(left), negated(right))
        case Binary(operator, left, right):
            return Binary(OPPOSITE[operator], left, right)
    return Not(tree)


def positive(tree: Expression) -> Expression:
    """`tree` with `~` before elements only."""
    match tree:
        case Not(operand) if not isinstance(operand, Element):
            return negated(operand)
        case Binary("&" | "|" as operator, left, right):
            return Binary(operator, positive(left), positive(right))
    return tree


def _text(tree: Expression) -> str:
    match tree:
        case Literal(value):
            return str(value)
        case Index(name):
            return name
        case Size(position):
            return f"s{position}"
        case Element(position, indices):
            return f"t{position}[{', '.join(map(_text, indices))}]"
        case Not(operand):
            return f"~{_wrapped(operand)}"
        case Binary(operator, left, right):
            return f"{_wrapped(left)} {operator} {_wrapped(right)}"


def _wrapped(tree: Expression) -> str:
    return f"({_text(tree)})" if isinstance(tree, Binary) else _text(tree)


def _truth(value: Tensor) -> Tensor:
    return value if value.dtype == torch.bool else value.ne(0)


def _evaluate(tree: Expression, names: dict[str, Tensor], tensors: Sequence[Tensor], sizes: Sequence[int], device: torch.device) -> Tensor:
    match tree:
        case Literal(value):
            return torch.tensor(value, device=device)
        case Index(name):
            return names[name]
        case Size(position):
            return torch.tensor(int(sizes[position]), device=device)
        case Element(position, indices):
            return tensors[position][tuple(_evaluate(index, names, tensors, sizes, device) for index in indices)]
        case Not(operand):
            return _truth(_evaluate(operand, names, tensors, sizes, device)).logical_not()
        case Binary(operator, left, right):
            return _APPLY[operator](
                _evaluate(left, names, tensors, sizes, device),
                _evaluate(right, names, tensors, sizes, device),
            )


# Interval arithmetic. An interval of numbers is (low, high), both inclusive, or None if unknown; one of truths is (possible, certain).
_Interval = tuple[Tensor, Tensor]


def _tight(tree: Expression) -> bool:
    """Each of q and k occurs once and moves its side of one comparison monotonically: then both sides reach their extremes together."""
    match tree:
        case Literal():
            return True
        case Element(_, indices):
            return all(not isinstance(i, Binary | Element) for i in indices) and _single_use(tree)
        case Not(operand):
            return isinstance(operand, Element) and _tight(operand)
        case Binary("|", left, right):
            return _tight(left) and _tight(right)
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


def _bool_bounds(tree: Expression, r: Ranges, tensors: Sequence[Tensor], sizes: Sequence[int]) -> _Interval:
    match tree:
        case Literal(value):
            constant = torch.tensor(bool(value), device=r.q.device)
            return constant, constant
        case Not(operand):
            possible, certain = _bool_bounds(operand, r, tensors, sizes)
            return ~certain, ~possible
        case Element(position):
            low, high = _element_bounds(tree, tensors[position].ne(0).to(torch.int8), r, tensors, sizes)
            return high.bool(), low.bool()
        case Binary(operator, left, right) if tree.logical:
            a, b = _bool_bounds(left, r, tensors, sizes), _bool_bounds(right, r, tensors, sizes)
            return _APPLY[operator](a[0], b[0]), _APPLY[operator](a[1], b[1])
        case Binary(operator, left, right):
            return _compare_bounds(operator, _number_bounds(left, r, tensors, sizes), _number_bounds(right, r, tensors, sizes), r)
    raise AssertionError(f"{tree} is no condition: parse() lets none through")


def _compare_bounds(operator: str, a: _Interval | None, b: _Interval | None, r: Ranges) -> _Interval:
    if a is None or b is None:
        return torch.tensor(True, device=r.q.device), torch.tensor(False, device=r.q.device)
    if operator in (">", ">="):
        return _compare_bounds(MIRROR[operator], b, a, r)
    if operator in ("<", "<="):
        return _APPLY[operator](a[0], b[1]), _APPLY[operator](a[1], b[0])
    possible = (a[0] <= b[1]) & (b[0] <= a[1])
    certain = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return (possible, certain) if operator == "==" else (~certain, ~possible)


def _number_bounds(tree: Expression, r: Ranges, tensors: Sequence[Tensor], sizes: Sequence[int]) -> _Interval | None:
    match tree:
        case Literal(value):
            constant = torch.tensor(int(value), device=r.q.device)
            return constant, constant
        case Size(position):
            constant = torch.tensor(int(sizes[position]), device=r.q.device)
            return constant, constant
        case Index("q"):
            return r.q * r.q_step, ((r.q + 1) * r.q_step).clamp(max=r.q_size) - 1
        case Index("k"):
            return r.k * r.k_step, ((r.k + 1) * r.k_step).clamp(max=r.k_size) - 1
        case Index(name):
            return (r.b, r.b) if name == "b" else (r.h, r.h)
        case Element(position):
            return _element_bounds(tree, tensors[position], r, tensors, sizes)
        case Binary(operator, left, right):
            a, b = _number_bounds(left, r, tensors, sizes), _number_bounds(right, r, tensors, sizes)
            return None if a is None or b is None else _arithmetic_bounds(operator, a, b)
    raise AssertionError(f"{tree} is no number: parse() lets none through")


def _arithmetic_bounds(operator: str, a: _Interval, b: _Interval) -> _Interval | None:
    if operator == "+":
        return a[0] + b[0], a[1] + b[1]
    if operator == "-":
        return a[0] - b[1], a[1] - b[0]
    if operator == "*":
        products = torch.stack(torch.broadcast_tensors(a[0] * b[0], a[0] * b[1], a[1] * b[0], a[1] * b[1]))
        return products.amin(0), products.amax(0)
    # A quotient or remainder is followed only where the divisor is one positive number.
    if not (bool((b[0] == b[1]).all()) and bool((b[0] > 0).all())):
        return None
    divide = _APPLY["//"]
    low, high = divide(a[0], b[0]), divide(a[1], b[0])
    if operator == "//":
        return low, high
    same = low == high
    return torch.where(same, a[0] % b[0], 0), torch.where(same, a[1] % b[0], b[0] - 1)


def _element_bounds(tree: Element, values: Tensor, r: Ranges, tensors: Sequence[Tensor], sizes: Sequence[int]) -> _Interval:
    """Least and greatest element that the indices reach: exact where they are plain names, that of the whole axis elsewhere."""
    low = high = values
    picks: list[Tensor] = []
    for axis, index in enumerate(tree.indices):
        if isinstance(index, Index) and index.name in "qk":
            numbers, step, size = (r.q, r.q_step, r.q_size) if index.name == "q" else (r.k, r.k_step, r.k_size)
            if values.shape[axis] < size:
                raise PredicateError(
                    f"t{tree.position} has {values.shape[axis]} elements along axis {axis}, fewer than {index.name} takes ({size})"
                )
            low, high = (
                _reduced(low.narrow(axis, 0, size), axis, step, torch.amin),
                _reduced(high.narrow(axis, 0, size), axis, step, torch.amax),
            )
            picks.append(numbers)
            continue
        interval = _number_bounds(index, r, tensors, sizes)
        if interval is not None and bool((interval[0] == interval[1]).all()):
            picks.append(interval[0])
        else:
            low, high = low.amin(axis, keepdim=True), high.amax(axis, keepdim=True)
            picks.append(torch.zeros((), dtype=torch.int64, device=values.device))
    return low[tuple(picks)], high[tuple(picks)]


def _reduced(values: Tensor, axis: int, step: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce each run of `step` elements along `axis`; the last run may be shorter."""
    if step == 1:
        return values
    whole = values.shape[axis] // step * step
    parts = [reduce(values.narrow(axis, 0, whole).unflatten(axis, (-1, step)), dim=axis + 1)] if whole else []
    if whole < values.shape[axis]:
        parts.append(reduce(values.narrow(axis, whole, values.shape[axis] - whole), dim=axis, keepdim=True))
    return torch.cat(parts, axis)
