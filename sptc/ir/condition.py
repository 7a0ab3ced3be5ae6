"""Conditions over positions: the one language that masks are read into, kept in, and written out of.

A number is a tree of `Binary` with arithmetic operators over literals, indices, sizes and elements of tensors; a condition one of
comparisons, `&`, `|`, `Not` and elements. `sptc/ir/predicate.py` has its grammar.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sptc.ir.errors import SptcError

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {  # on numbers, or on tensors of them
    **{"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod},
    **{"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne},
}
MIRROR = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}  # with the sides exchanged
OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}  # what holds where it does not


class PredicateError(SptcError, ValueError):
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


def is_condition(tree: Expression) -> bool:
    """Whether the expression can stand as a condition (an element can, and as a number too)."""
    match tree:
        case Literal(value):
            return isinstance(value, bool)
        case Not() | Element():
            return True
        case Binary():
            return tree.logical or tree.operator in OPPOSITE
    return False


def text_of(tree: Expression) -> str:
    match tree:
        case Literal(value):
            return str(value)
        case Index(name):
            return name
        case Size(position):
            return f"s{position}"
        case Element(position, indices):
            return f"t{position}[{', '.join(map(text_of, indices))}]"
        case Not(operand):
            return f"~{_wrapped(operand)}"
        case Binary(operator, left, right):
            return f"{_wrapped(left)} {operator} {_wrapped(right)}"


def _wrapped(tree: Expression) -> str:
    return f"({text_of(tree)})" if isinstance(tree, Binary) else text_of(tree)
