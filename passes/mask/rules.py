"""Rules of the mask reader: one for each operator, by name. This file holds the table and what rules share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from sptc.ir.condition import Element
from sptc.passes.graph.site import called
from sptc.passes.mask import terms
from sptc.passes.mask.terms import Linear, Number, Term, Unreadable

if TYPE_CHECKING:
    from sptc.passes.mask.reader import Reader

At = tuple[Linear, ...]
Rule = Callable[["Reader", Node, At], Term]
RULES: dict[str, Rule] = {}


def reads(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule, which tells node[at], for the operators `names`. It raises Unreadable where it does not know."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def source_of(node: Node) -> Node:
    """The first argument, which must be a tensor's node."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise Unreadable(f"{called(node)} has no tensor argument")
    return source


def writes(node: Node) -> Node | None:
    """`node` itself if it works in place: its first argument is then read as it was before."""
    return node if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable else None


def axis_of(dim: Any, rank: int) -> int:
    return int(dim) % rank if rank else 0


def converted(term: Term, kind: torch.dtype | None) -> Term:
    if kind == torch.bool:
        return terms.as_truth(term)
    number = terms.as_number(term)
    if kind is not None and not kind.is_floating_point and not _integral(number):
        raise Unreadable("rounding to integers")
    return number


_NARROW = {  # integers that a dtype tells apart; wider ones hold every position, and labels of documents and the like
    torch.bfloat16: (-(1 << 8), 1 << 8),
    torch.float16: (-(1 << 11), 1 << 11),
    torch.uint8: (0, (1 << 8) - 1),
    torch.int8: (-(1 << 7), (1 << 7) - 1),
    torch.int16: (-(1 << 15), (1 << 15) - 1),
}


def exact(term: Term, kind: torch.dtype | None) -> Term:
    """A term that an element of a dtype holds as it is.

    Raises:
        Unreadable: a number made of positions or flags may be rounded, or wrap around.
    """
    if kind in _NARROW and isinstance(term, terms.Linear | terms.Cases) and not _within(term, *_NARROW[kind], kind.is_floating_point):
        raise Unreadable(f"numbers that {kind} may not hold")
    return term


def _within(number: Number, low: int, high: int, floating: bool) -> bool:
    """Whether the values of a number lie between two. Of a floating sum constants and flags are taken to."""
    if isinstance(number, terms.Cases):
        return _within(number.then, low, high, floating) and _within(number.other, low, high, floating)
    if floating and all(isinstance(atom, Element) for atom, _ in number.terms):
        return True
    if not all(c == int(c) for _, c in number.terms) or not math.isfinite(number.constant):
        return True  # no comparison reads it
    least, most = terms.bounds(number)
    return low <= least and most <= high


def _integral(number: Number) -> bool:
    if isinstance(number, terms.Cases):
        return _integral(number.then) and _integral(number.other)
    coefficients = (number.constant, *(c for _, c in number.terms))
    floating = any(isinstance(atom, Element) and terms.floating(atom) for atom, _ in number.terms)
    return not floating and all(math.isfinite(c) and c == int(c) for c in coefficients)


def either(condition: Term, then: Term, other: Term, kind: torch.dtype | None) -> Term:
    truth = terms.as_truth(condition)
    if kind == torch.bool:
        return terms.select(truth, terms.as_truth(then), terms.as_truth(other))
    return terms.choose(truth, terms.as_number(then), terms.as_number(other))


def moved(at: At, dim: int, index: Number) -> At:
    if not isinstance(index, Linear):
        raise Unreadable("an index by cases")
    return (*at[:dim], index, *at[dim + 1 :])
