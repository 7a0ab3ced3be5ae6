"""Rules of the mask reader for operators that compute values: inputs, factories, arithmetic, comparisons, logic, cases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from sptc.passes.graph.pattern import COPIES, argument, dtype, op, same_size, shape
from sptc.passes.mask import terms
from sptc.passes.mask.rules import At, axis_of, converted, either, moved, reads, source_of, writes
from sptc.passes.mask.terms import ONE, ZERO, Linear, Term, Unreadable

if TYPE_CHECKING:
    from sptc.passes.mask.reader import Reader


# where reading goes on elsewhere


@reads("placeholder")
def _placeholder(reader: Reader, node: Node, at: At) -> Term:
    outer = reader.outer(node)
    if outer is None:
        raise Unreadable("an input")
    return reader.element(outer, at)


@reads("get_attr")
def _constant(reader: Reader, node: Node, at: At) -> Term:
    held: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        held = getattr(held, name)
    if not isinstance(held, torch.Tensor) or isinstance(held, torch.nn.Parameter) or held.numel() != 1:
        raise Unreadable("not one number")
    number = held.item()
    return number if isinstance(number, bool) else Linear(number)


@reads(*COPIES, "aten.expand_copy.default", "aten.detach_.default")
def _copy(reader: Reader, node: Node, at: At) -> Term:
    return converted(reader.element(source_of(node), at, writes(node)), dtype(node))


# factories


@reads("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(reader: Reader, node: Node, at: At) -> Term:
    start = reader.number(node.args[0], ()) if len(node.args) > 1 else ZERO
    step = reader.number(argument(node, 2, "step", 1), ())
    return terms.add(start, terms.multiply(step, at[0]))


_FILLS = {"zeros": 0, "ones": 1, "new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1, "zero_": 0}


@reads(*(f"aten.{name}.default" for name in _FILLS))
def _filled(reader: Reader, node: Node, at: At) -> Term:
    return converted(Linear(_FILLS[op(node).split(".")[1]]), dtype(node))


@reads("aten.full.default", "aten.full_like.default", "aten.fill_.Scalar", "aten.fill_.Tensor", "aten.fill.Scalar")
def _full(reader: Reader, node: Node, at: At) -> Term:
    return converted(reader.argument(node.args[1], ()), dtype(node))


@reads("aten.new_full.default")
def _new_full(reader: Reader, node: Node, at: At) -> Term:
    return converted(reader.argument(node.args[2], ()), dtype(node))


@reads("aten.scalar_tensor.default")
def _scalar_tensor(reader: Reader, node: Node, at: At) -> Term:
    return converted(reader.scalar(node.args[0]), dtype(node))


# arithmetic


@reads("aten.add.Tensor", "aten.add_.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub_.Tensor", "aten.sub.Scalar")
def _sum(reader: Reader, node: Node, at: At) -> Term:
    a = reader.number(node.args[0], at, writes(node))
    b = terms.multiply(Linear(argument(node, 2, "alpha", 1)), reader.number(node.args[1], at))
    return converted(terms.subtract(a, b) if ".sub" in op(node) else terms.add(a, b), dtype(node))


@reads("aten.rsub.Scalar", "aten.rsub.Tensor")
def _reversed_difference(reader: Reader, node: Node, at: At) -> Term:
    a = terms.multiply(Linear(argument(node, 2, "alpha", 1)), reader.number(node.args[0], at))
    return terms.subtract(reader.number(node.args[1], at), a)


@reads("aten.mul.Tensor", "aten.mul_.Tensor", "aten.mul.Scalar")
def _product(reader: Reader, node: Node, at: At) -> Term:
    a, b = reader.argument(node.args[0], at, writes(node)), reader.argument(node.args[1], at)
    if dtype(node) == torch.bool:
        return terms.conjunction(terms.as_truth(a), terms.as_truth(b))
    return terms.multiply(terms.as_number(a), terms.as_number(b))


@reads("aten.div.Tensor", "aten.div.Scalar")
def _quotient(reader: Reader, node: Node, at: At) -> Term:
    divisor = reader.number(node.args[1], at)
    if not isinstance(divisor, Linear) or not divisor.is_constant or divisor.constant == 0:
        raise Unreadable("a quotient by a variable")
    return terms.multiply(Linear(1 / divisor.constant), reader.number(node.args[0], at))


@reads("aten.floor_divide.default", "aten.floor_divide.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode")
def _floor_quotient(reader: Reader, node: Node, at: At) -> Term:
    if ".div." in op(node) and node.kwargs.get("rounding_mode") != "floor":
        raise Unreadable("a quotient rounded towards zero")
    return terms.floor_divide(reader.number(node.args[0], at), _positive(reader, node.args[1], at))


@reads("aten.remainder.Scalar", "aten.remainder.Tensor")
def _remainder(reader: Reader, node: Node, at: At) -> Term:
    return terms.remainder(reader.number(node.args[0], at), _positive(reader, node.args[1], at))


def _positive(reader: Reader, arg: Any, at: At) -> int:
    number = reader.number(arg, at)
    if not isinstance(number, Linear) or not number.is_constant or number.constant != int(number.constant) or number.constant < 1:
        raise Unreadable("a divisor that is no positive integer")
    return int(number.constant)


@reads("aten.neg.default")
def _negative(reader: Reader, node: Node, at: At) -> Term:
    return terms.negate(reader.number(node.args[0], at))


@reads("aten.abs.default")
def _absolute(reader: Reader, node: Node, at: At) -> Term:
    return terms.absolute(reader.number(node.args[0], at))


@reads("aten.cumsum.default")
def _running_sum(reader: Reader, node: Node, at: At) -> Term:
    dim = axis_of(node.args[1], len(at))
    step = reader.number(node.args[0], at)
    if not isinstance(step, Linear) or not step.is_constant:
        raise Unreadable("a running sum of a variable")
    return terms.multiply(step, terms.add(at[dim], ONE))


@reads("aten.diff.default")
def _difference(reader: Reader, node: Node, at: At) -> Term:
    dim = axis_of(argument(node, 2, "dim", -1), len(at))
    first, last = argument(node, 3, "prepend"), argument(node, 4, "append")
    if argument(node, 1, "n", 1) != 1 or last is not None or dtype(node) == torch.bool:
        raise Unreadable("a difference of another kind")
    here = at[dim]
    if first is None:
        return terms.subtract(reader.number(node.args[0], moved(at, dim, terms.add(here, ONE))), reader.number(node.args[0], at))
    if not same_size(shape(first)[dim], 1):
        raise Unreadable("a difference with more than one value before")
    previous = moved(at, dim, terms.subtract(here, ONE))
    earlier = terms.choose(
        terms.compare("<", here, ONE),
        reader.number(first, moved(at, dim, ZERO)),
        reader.number(node.args[0], previous),
    )
    return terms.subtract(reader.number(node.args[0], at), earlier)


# comparisons, logic, cases

_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


@reads(*(f"aten.{name}.{kind}" for name in _COMPARISONS for kind in ("Tensor", "Scalar")))
def _comparison(reader: Reader, node: Node, at: At) -> Term:
    relation = _COMPARISONS[op(node).split(".")[1]]
    return terms.compare(relation, reader.number(node.args[0], at), reader.number(node.args[1], at))


@reads("aten.logical_not.default", "aten.bitwise_not.default", "aten.logical_not_.default", "aten.bitwise_not_.default")
def _inverse(reader: Reader, node: Node, at: At) -> Term:
    if dtype(node) != torch.bool:
        raise Unreadable("bits of integers")
    return terms.negation(terms.as_truth(reader.argument(node.args[0], at, writes(node))))


_LOGIC = {"and": terms.conjunction, "or": terms.disjunction, "xor": lambda a, b: terms.select(a, terms.negation(b), b)}


@reads(
    *(f"aten.logical_{name}{mark}.default" for name in _LOGIC for mark in ("", "_")),
    *(f"aten.bitwise_{name}{mark}.{kind}" for name in _LOGIC for mark in ("", "_") for kind in ("Tensor", "Scalar")),
    *(f"aten.__{mark}{name}__.{kind}" for name in _LOGIC for mark in ("", "i") for kind in ("Tensor", "Scalar")),
)
def _logic(reader: Reader, node: Node, at: At) -> Term:
    if dtype(node) != torch.bool:
        raise Unreadable("bits of integers")
    name = op(node).split(".")[1].strip("_").removeprefix("logical_").removeprefix("bitwise_")
    combine = _LOGIC[name if name in _LOGIC else name[1:]]
    return combine(terms.as_truth(reader.argument(node.args[0], at, writes(node))), terms.as_truth(reader.argument(node.args[1], at)))


@reads("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def _where(reader: Reader, node: Node, at: At) -> Term:
    condition, then, other = (reader.argument(arg, at) for arg in node.args)
    return either(condition, then, other, dtype(node))


@reads("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", "aten.masked_fill_.Scalar", "aten.masked_fill_.Tensor")
def _masked_fill(reader: Reader, node: Node, at: At) -> Term:
    kept, mask, fill = node.args
    return either(reader.argument(mask, at), reader.argument(fill, ()), reader.argument(kept, at, writes(node)), dtype(node))


@reads("aten.tril.default", "aten.tril_.default", "aten.triu.default", "aten.triu_.default")
def _triangle(reader: Reader, node: Node, at: At) -> Term:
    diagonal = reader.number(argument(node, 1, "diagonal", 0), ())
    kept = terms.compare("<=" if ".tril" in op(node) else ">=", terms.subtract(at[-1], at[-2]), diagonal)
    return either(kept, reader.element(source_of(node), at, writes(node)), converted(ZERO, dtype(node)), dtype(node))
