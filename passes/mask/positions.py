"""Rules of the mask reader for operators that move elements: views, slices, concatenation, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from sptc.ir.condition import Element
from sptc.passes.graph.pattern import VIEWS, argument, dtype, same_size, shape
from sptc.passes.mask import terms
from sptc.passes.mask.rules import At, axis_of, either, moved, reads, source_of
from sptc.passes.mask.terms import ONE, ZERO, Linear, Number, Term, Unreadable

if TYPE_CHECKING:
    from sptc.passes.mask.reader import Reader


# the same elements at other positions


@reads("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def _expand(reader: Reader, node: Node, at: At) -> Term:
    return reader.argument(node.args[0], at)


@reads("aten.unsqueeze.default")
def _unsqueeze(reader: Reader, node: Node, at: At) -> Term:
    dim = axis_of(node.args[1], len(at))
    return reader.element(source_of(node), (*at[:dim], *at[dim + 1 :]))


@reads(*(VIEWS - {"aten.unsqueeze.default"}))
def _view(reader: Reader, node: Node, at: At) -> Term:
    source = source_of(node)
    return reader.element(source, _reshaped(reader, at, node, source))


def _reshaped(reader: Reader, at: At, node: Node, source: Node) -> At:
    """Where in `source` the element `at` of its reshaped form `node` lies, dimension group by dimension group of equal products."""
    before, after = shape(source), shape(node)
    result: list[Linear] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left, right = 1, 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        left = left * before[start_i] if start_i < i else left
        right = right * after[start_j] if start_j < j else right
        while not same_size(left, right):
            if i < len(before) and (j == len(after) or _smaller(left, right)):
                left, i = left * before[i], i + 1
            elif j < len(after):
                right, j = right * after[j], j + 1
            else:
                raise Unreadable("a view of unrelated sizes")
        result += _regrouped(before[start_i:i], after[start_j:j], at[start_j:j])
    return tuple(result)


def _smaller(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return isinstance(a, int)


def _regrouped(before: Sequence[Any], after: Sequence[Any], at: At) -> list[Linear]:
    axes = [i for i, size in enumerate(before) if not same_size(size, 1)]
    used = [i for i, size in enumerate(after) if not same_size(size, 1)]
    result = [ZERO] * len(before)
    if len(axes) == len(used) and all(same_size(before[i], after[j]) for i, j in zip(axes, used, strict=True)):
        for i, j in zip(axes, used, strict=True):
            result[i] = at[j]
        return result
    flat: Number = ZERO
    for index, size in zip(at, after, strict=True):
        if not isinstance(size, int):
            raise Unreadable("a view that merges symbolic sizes")
        flat = terms.add(terms.multiply(Linear(size), flat), index)
    for axis in reversed(axes):
        size = before[axis]
        if not isinstance(size, int):
            raise Unreadable("a view that splits symbolic sizes")
        part = flat if axis == axes[0] else terms.remainder(flat, size)
        flat = terms.floor_divide(flat, size)
        if not isinstance(part, Linear):
            raise Unreadable("an index by cases")
        result[axis] = part
    return result


@reads("aten.transpose.int", "aten.t.default", "aten.mT.default", "aten.swapaxes.default")
def _transpose(reader: Reader, node: Node, at: At) -> Term:
    order = list(range(len(at)))
    if order[1:]:
        a, b = (-2, -1) if len(node.args) == 1 else (axis_of(node.args[1], len(at)), axis_of(node.args[2], len(at)))
        order[a], order[b] = order[b], order[a]
    return reader.element(source_of(node), tuple(at[i] for i in order))


@reads("aten.permute.default")
def _permute(reader: Reader, node: Node, at: At) -> Term:
    dims: Any = node.args[1]
    source = [ZERO] * len(at)
    for position, dim in enumerate(dims):
        source[axis_of(dim, len(at))] = at[position]
    return reader.element(source_of(node), tuple(source))


@reads("aten.slice.Tensor", "aten.narrow.default")
def _slice(reader: Reader, node: Node, at: At) -> Term:
    source, dim = source_of(node), axis_of(argument(node, 1, "dim", 0), len(at))
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    first: Number = ZERO if start is None else reader.number(start, ())
    least, most = terms.bounds(first)
    if most < 0:
        first = terms.add(first, reader.dimension(source, dim))
        least, _ = terms.bounds(first)
        if least < 0:  # a start before the first element is cut off
            raise Unreadable("a slice with an unknown start")
    elif least < 0:
        raise Unreadable("a slice with an unknown start")
    return reader.element(source, moved(at, dim, terms.add(first, terms.multiply(Linear(step), at[dim]))))


@reads("aten.select.int")
def _select(reader: Reader, node: Node, at: At) -> Term:
    source = source_of(node)
    dim, index = axis_of(node.args[1], len(shape(source))), node.args[2]
    if not isinstance(index, int):
        raise Unreadable("a selection by a variable")
    position = Linear(index) if index >= 0 else terms.add(Linear(index), reader.dimension(source, dim))
    return reader.element(source, moved((*at[:dim], ZERO, *at[dim:]), dim, position))


@reads("aten.flip.default")
def _flip(reader: Reader, node: Node, at: At) -> Term:
    dims: Any = node.args[1]
    for dim in dims:
        axis = axis_of(dim, len(at))
        last = terms.subtract(reader.dimension(node, axis), ONE)
        at = moved(at, axis, terms.subtract(last, at[axis]))
    return reader.element(source_of(node), at)


@reads("aten.cat.default")
def _cat(reader: Reader, node: Node, at: At) -> Term:
    parts: Any = node.args[0]
    dim = axis_of(argument(node, 1, "dim", 0), len(at))
    parts = [part for part in parts if len(shape(part)) == len(at)]  # an empty 1-d tensor is allowed beside any others
    *heads, last = parts
    starts = [0]
    for part in heads:
        size = shape(part)[dim]
        if not isinstance(size, int):
            raise Unreadable("a concatenation of symbolic sizes")
        starts.append(starts[-1] + size)
    term: Term = reader.element(last, moved(at, dim, terms.subtract(at[dim], Linear(starts[-1]))))
    for part, start, end in zip(reversed(heads), reversed(starts[:-1]), reversed(starts[1:]), strict=True):
        inside = terms.compare("<", at[dim], Linear(end))
        here = reader.element(part, moved(at, dim, terms.subtract(at[dim], Linear(start))))
        term = either(inside, here, term, dtype(node))
    if heads and any(isinstance(atom, Element) for atom in terms.atoms(term)):
        raise Unreadable("positions outside of the parts")  # an operand of one part would be read past its end
    return term


@reads("aten.index.Tensor")
def _index(reader: Reader, node: Node, at: At) -> Term:
    source = source_of(node)
    picked: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    picked += [None] * (len(shape(source)) - len(picked))
    given = [i for i, p in enumerate(picked) if p is not None]
    if any(dtype(picked[i]) == torch.bool for i in given):
        raise Unreadable("an index by a mask")
    rank = max(len(shape(picked[i])) for i in given)
    start = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    inner = at[start : start + rank]
    rest = iter((*at[:start], *at[start + rank :]))
    return reader.element(source, tuple(_position(reader, p, inner) if p is not None else next(rest) for p in picked))


def _position(reader: Reader, index: Node, at: At) -> Linear:
    position = reader.number(index, at)
    least, _ = terms.bounds(position)
    if not isinstance(position, Linear) or least < 0:
        raise Unreadable("an index that may be negative")
    return position
