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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sptc.ir.condition import (
    OPERATORS,
    Binary,
    Element,
    Expression,
    Index,
    Literal,
    Not,
    PredicateError,
    Size,
    is_condition,
    operands,
    text_of,
    walk,
)  # fmt: skip
from sptc.ir.intervals import OverRanges, Ranges, tight, widened

INDICES = ("b", "h", "q", "k")
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%"}
_LOGIC = {ast.BitAnd: "&", ast.BitOr: "|"}
_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


@dataclass(frozen=True)
class Predicate:
    """A checked predicate. `str(predicate)` is its canonical text."""

    tree: Expression

    def __str__(self) -> str:
        return text_of(self.tree)

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
        return tight(self.tree)

    def bounds(self, ranges: Ranges, tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(possible, certain), bool, broadcast from `ranges`: where not possible it holds for none of them, where certain for all.

        Raises:
            PredicateError: a tensor is too short for the positions.
        """
        self.check(tensors, sizes)
        truth = OverRanges(ranges, tensors, sizes).truth(self.tree)
        return ~truth.nowhere, truth.certain


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
    if not is_condition(tree):
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
        if isinstance(built, Element) or is_condition(built) == boolean:
            return built
        expected, hint = ("a condition", "; put comparisons in parentheses") if boolean else ("a number", "")
        raise self._error(node, f"expected {expected} here{hint}")

    def _error(self, node: ast.expr, message: str) -> PredicateError:
        return PredicateError(f"predicate {self.source!r}, column {node.col_offset + 1}: {message}")


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
            return widened(tensors[position][tuple(_evaluate(index, names, tensors, sizes, device) for index in indices)])
        case Not(operand):
            return _truth(_evaluate(operand, names, tensors, sizes, device)).logical_not()
        case Binary(operator, left, right):
            a, b = (_evaluate(side, names, tensors, sizes, device) for side in (left, right))
            if tree.logical:
                return _truth(a) & _truth(b) if operator == "&" else _truth(a) | _truth(b)
            result: Tensor = OPERATORS[operator](a, b)
            return result
