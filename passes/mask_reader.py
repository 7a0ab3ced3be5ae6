"""Reads one element of a graph node as a term of its indices, by walking the operators that build the tensor.

`Reader.element(node, at)` answers "what is node[at]?" for symbolic positions `at`. Each operator has one rule, which asks for elements of
its arguments in turn; an operator without a rule ends the walk, and its tensor stays as an operand of the term. No rule looks at values
of the example inputs: what is read holds for every input of the same shapes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from sptc.passes import mask_terms as terms
from sptc.passes.boundary import alias_sets
from sptc.passes.mask_terms import ONE, ZERO, Element, Linear, Number, Size, Term, Unreadable
from sptc.passes.pattern import COPIES, VIEWS, argument, dtype, op, same_size, shape, value

At = tuple[Linear, ...]
_Rule = Callable[["Reader", Node, At], Term]
_RULES: dict[str, _Rule] = {}


def _reads(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


_SIZE_ARITHMETIC: dict[Any, Callable[..., Number]] = {
    operator.add: terms.add,
    operator.sub: terms.subtract,
    operator.mul: terms.multiply,
    operator.neg: terms.negate,
}


class Reader:
    """Reads elements of the nodes of one graph.

    Args:
        outer: for the body of a checkpoint: what each of its placeholders is in the graph around it. Reading goes on there.
    """

    def __init__(self, outer: Mapping[Node, Node] | None = None) -> None:
        self._outer = outer or {}
        self._writers: dict[Graph, Mapping[Node, Sequence[Node]]] = {}
        self._sizes: dict[Graph, Mapping[Any, Node]] = {}
        self._memo: dict[tuple[Node, At], Term] = {}

    def element(self, node: Node, at: At, before: Node | None = None) -> Term:
        """The term for node[at]: a truth if the tensor is boolean, else a number.

        Args:
            at: one index a dimension.
            before: the in-place operator that reads `node` before it writes there; None for readers that come after every write.

        Raises:
            Unreadable: the tensor is changed in place after `node` was computed.
        """
        if not self._settled(node, before):
            raise Unreadable(f"{node.name} is changed in place")
        key = (node, at)
        if key not in self._memo:
            self._memo[key] = self._read(node, at)
        return self._memo[key]

    def _read(self, node: Node, at: At) -> Term:
        rule = _RULES.get(op(node) or node.op)
        if rule is not None:
            try:
                return rule(self, node, at)
            except Unreadable:
                pass
        return _leaf(node, at)

    def _settled(self, node: Node, before: Node | None) -> bool:
        writers = self._writers_of(node)
        return all(w is node or w < node for w in writers if before is None or w < before)

    def _writers_of(self, node: Node) -> Sequence[Node]:
        graph = node.graph
        if graph not in self._writers:
            self._writers[graph] = _writers(graph)
        return self._writers[graph].get(node, ())

    def argument(self, arg: Any, at: At, before: Node | None = None) -> Term:
        """The element of an argument that broadcasts against `at`: a tensor node, a size, or a number."""
        if isinstance(arg, Node) and isinstance(value(arg), torch.Tensor):
            sizes = shape(arg)
            tail = at[len(at) - len(sizes) :]
            return self.element(arg, tuple(ZERO if same_size(s, 1) else i for s, i in zip(sizes, tail, strict=True)), before)
        return self.scalar(arg)

    def number(self, arg: Any, at: At, before: Node | None = None) -> Number:
        return terms.as_number(self.argument(arg, at, before))

    def scalar(self, arg: Any) -> Term:
        """A number, a truth value, or a node that computes a size."""
        if isinstance(arg, bool):
            return arg
        if isinstance(arg, int | float):
            return Linear(arg)
        number = value(arg)
        if isinstance(number, int | float):
            return Linear(number)
        if isinstance(arg, Node) and arg.target in _SIZE_ARITHMETIC:
            return _SIZE_ARITHMETIC[arg.target](*(terms.as_number(self.scalar(a)) for a in arg.args))
        if isinstance(number, torch.SymInt):
            return self.size(number, arg)
        raise Unreadable(f"{arg} is no number")

    def constant(self, arg: Any) -> float | None:
        """The one number that an argument holds in all its elements; None if it depends on anything."""
        if isinstance(arg, Node) and not all(same_size(size, 1) for size in shape(arg)):
            return None
        try:
            number = self.number(arg, (ZERO,) * (len(shape(arg)) if isinstance(arg, Node) else 0))
        except Unreadable:
            return None
        return float(number.constant) if isinstance(number, Linear) and number.is_constant else None

    def size(self, size: Any, node: Node | None = None) -> Linear:
        """A dimension of a shape; `node` is searched in the graph when it is symbolic and not given."""
        if isinstance(size, int):
            return Linear(size)
        if node is None:
            raise Unreadable(f"no node computes the size {size}")
        while node in self._outer:
            node = self._outer[node]
        return terms.linear(Size(size.node.expr, node))

    def dimension(self, node: Node, dim: int) -> Linear:
        """node.shape[dim]."""
        size = shape(node)[dim]
        return self.size(size, None if isinstance(size, int) else self._size_node(node.graph, size))

    def _size_node(self, graph: Graph, size: Any) -> Node | None:
        if graph not in self._sizes:
            self._sizes[graph] = {value(n).node.expr: n for n in reversed(list(graph.nodes)) if isinstance(value(n), torch.SymInt)}
        return self._sizes[graph].get(size.node.expr)

    def outer(self, node: Node) -> Node | None:
        return self._outer.get(node)


def _leaf(node: Node, at: At) -> Term:
    for index in at:
        least, _ = terms.bounds(index)
        if least is None or least < 0:
            raise Unreadable(f"an index of {node.name} may be negative")
    element = Element(node, tuple(ZERO if same_size(s, 1) else i for i, s in zip(at, shape(node), strict=True)))
    return element if element.boolean else terms.linear(element)


def _writers(graph: Graph) -> Mapping[Node, Sequence[Node]]:
    """For each node, the operators that change its memory in place; nodes of unchanged memory are left out."""
    written: list[tuple[Node, Node]] = []
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            for i, spec in enumerate(node.target._schema.arguments):
                arg = node.args[i] if i < len(node.args) else node.kwargs.get(spec.name)
                if spec.alias_info is not None and spec.alias_info.is_write and isinstance(arg, Node):
                    written.append((node, arg))
    if not written:
        return {}
    aliases = alias_sets(graph)
    return {node: found for node in graph.nodes if (found := [w for w, arg in written if aliases[arg] == aliases[node]])}


def _source(node: Node) -> Node:
    """The first argument, which must be a tensor's node."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise Unreadable(f"{node.name} has no tensor argument")
    return source


def _writes(node: Node) -> Node | None:
    """`node` itself if it works in place: its first argument is then read as it was before."""
    return node if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable else None


def _dim(dim: Any, rank: int) -> int:
    return int(dim) % rank if rank else 0


# where reading goes on elsewhere


@_reads("placeholder")
def _placeholder(reader: Reader, node: Node, at: At) -> Term:
    outer = reader.outer(node)
    if outer is None:
        raise Unreadable("an input")
    return reader.element(outer, at)


@_reads("get_attr")
def _constant(reader: Reader, node: Node, at: At) -> Term:
    held: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        held = getattr(held, name)
    if not isinstance(held, torch.Tensor) or isinstance(held, torch.nn.Parameter) or held.numel() != 1:
        raise Unreadable("not one number")
    number = held.item()
    return number if isinstance(number, bool) else Linear(number)


@_reads(*COPIES, "aten.expand_copy.default")
def _copy(reader: Reader, node: Node, at: At) -> Term:
    return _converted(reader.element(_source(node), at), dtype(node))


def _converted(term: Term, kind: torch.dtype | None) -> Term:
    if kind == torch.bool:
        return terms.as_truth(term)
    number = terms.as_number(term)
    if kind is not None and not kind.is_floating_point and not _integral(number):
        raise Unreadable("rounding to integers")
    return number


def _integral(number: Number) -> bool:
    if isinstance(number, terms.Choice):
        return _integral(number.then) and _integral(number.other)
    coefficients = (number.constant, *(c for _, c in number.terms))
    floating = any(isinstance(atom, Element) and atom.floating for atom, _ in number.terms)
    return not floating and all(math.isfinite(c) and c == int(c) for c in coefficients)


# factories


@_reads("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(reader: Reader, node: Node, at: At) -> Term:
    start = reader.number(node.args[0], ()) if len(node.args) > 1 else ZERO
    step = reader.number(argument(node, 2, "step", 1), ())
    return terms.add(start, terms.multiply(step, at[0]))


_FILLS = {"zeros": 0, "ones": 1, "new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1, "zero_": 0}


@_reads(*(f"aten.{name}.default" for name in _FILLS))
def _filled(reader: Reader, node: Node, at: At) -> Term:
    return _converted(Linear(_FILLS[op(node).split(".")[1]]), dtype(node))


@_reads("aten.full.default", "aten.full_like.default", "aten.fill_.Scalar", "aten.fill_.Tensor", "aten.fill.Scalar")
def _full(reader: Reader, node: Node, at: At) -> Term:
    return _converted(reader.argument(node.args[1], ()), dtype(node))


@_reads("aten.new_full.default")
def _new_full(reader: Reader, node: Node, at: At) -> Term:
    return _converted(reader.argument(node.args[2], ()), dtype(node))


@_reads("aten.scalar_tensor.default")
def _scalar_tensor(reader: Reader, node: Node, at: At) -> Term:
    return _converted(reader.scalar(node.args[0]), dtype(node))


# arithmetic


@_reads("aten.add.Tensor", "aten.add_.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub_.Tensor", "aten.sub.Scalar")
def _sum(reader: Reader, node: Node, at: At) -> Term:
    a = reader.number(node.args[0], at, _writes(node))
    b = terms.multiply(Linear(argument(node, 2, "alpha", 1)), reader.number(node.args[1], at))
    return _converted(terms.subtract(a, b) if ".sub" in op(node) else terms.add(a, b), dtype(node))


@_reads("aten.rsub.Scalar", "aten.rsub.Tensor")
def _reversed_difference(reader: Reader, node: Node, at: At) -> Term:
    a = terms.multiply(Linear(argument(node, 2, "alpha", 1)), reader.number(node.args[0], at))
    return terms.subtract(reader.number(node.args[1], at), a)


@_reads("aten.mul.Tensor", "aten.mul_.Tensor", "aten.mul.Scalar")
def _product(reader: Reader, node: Node, at: At) -> Term:
    a, b = reader.argument(node.args[0], at, _writes(node)), reader.argument(node.args[1], at)
    if dtype(node) == torch.bool:
        return terms.conjunction(terms.as_truth(a), terms.as_truth(b))
    return terms.multiply(terms.as_number(a), terms.as_number(b))


@_reads("aten.div.Tensor", "aten.div.Scalar")
def _quotient(reader: Reader, node: Node, at: At) -> Term:
    divisor = reader.number(node.args[1], at)
    if not isinstance(divisor, Linear) or not divisor.is_constant or divisor.constant == 0:
        raise Unreadable("a quotient by a variable")
    return terms.multiply(Linear(1 / divisor.constant), reader.number(node.args[0], at))


@_reads("aten.floor_divide.default", "aten.floor_divide.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode")
def _floor_quotient(reader: Reader, node: Node, at: At) -> Term:
    if ".div." in op(node) and node.kwargs.get("rounding_mode") != "floor":
        raise Unreadable("a quotient rounded towards zero")
    return terms.floor_divide(reader.number(node.args[0], at), _positive(reader, node.args[1], at))


@_reads("aten.remainder.Scalar", "aten.remainder.Tensor")
def _remainder(reader: Reader, node: Node, at: At) -> Term:
    return terms.remainder(reader.number(node.args[0], at), _positive(reader, node.args[1], at))


def _positive(reader: Reader, arg: Any, at: At) -> int:
    number = reader.number(arg, at)
    if not isinstance(number, Linear) or not number.is_constant or number.constant != int(number.constant) or number.constant < 1:
        raise Unreadable("a divisor that is no positive integer")
    return int(number.constant)


@_reads("aten.neg.default")
def _negative(reader: Reader, node: Node, at: At) -> Term:
    return terms.negate(reader.number(node.args[0], at))


@_reads("aten.abs.default")
def _absolute(reader: Reader, node: Node, at: At) -> Term:
    return terms.absolute(reader.number(node.args[0], at))


@_reads("aten.cumsum.default")
def _running_sum(reader: Reader, node: Node, at: At) -> Term:
    dim = _dim(node.args[1], len(at))
    step = reader.number(node.args[0], at)
    if not isinstance(step, Linear) or not step.is_constant:
        raise Unreadable("a running sum of a variable")
    return terms.multiply(step, terms.add(at[dim], ONE))


@_reads("aten.diff.default")
def _difference(reader: Reader, node: Node, at: At) -> Term:
    dim = _dim(argument(node, 2, "dim", -1), len(at))
    first, last = argument(node, 3, "prepend"), argument(node, 4, "append")
    if argument(node, 1, "n", 1) != 1 or last is not None or dtype(node) == torch.bool:
        raise Unreadable("a difference of another kind")
    here = at[dim]
    if first is None:
        return terms.subtract(reader.number(node.args[0], _moved(at, dim, terms.add(here, ONE))), reader.number(node.args[0], at))
    if not same_size(shape(first)[dim], 1):
        raise Unreadable("a difference with more than one value before")
    previous = _moved(at, dim, terms.subtract(here, ONE))
    earlier = terms.choose(
        terms.compare("<", here, ONE),
        reader.number(first, _moved(at, dim, ZERO)),
        reader.number(node.args[0], previous),
    )
    return terms.subtract(reader.number(node.args[0], at), earlier)


def _moved(at: At, dim: int, index: Number) -> At:
    if not isinstance(index, Linear):
        raise Unreadable("an index by cases")
    return (*at[:dim], index, *at[dim + 1 :])


# comparisons, logic, cases

_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


@_reads(*(f"aten.{name}.{kind}" for name in _COMPARISONS for kind in ("Tensor", "Scalar")))
def _comparison(reader: Reader, node: Node, at: At) -> Term:
    relation = _COMPARISONS[op(node).split(".")[1]]
    return terms.compare(relation, reader.number(node.args[0], at), reader.number(node.args[1], at))


@_reads("aten.logical_not.default", "aten.bitwise_not.default", "aten.logical_not_.default", "aten.bitwise_not_.default")
def _inverse(reader: Reader, node: Node, at: At) -> Term:
    if dtype(node) != torch.bool:
        raise Unreadable("bits of integers")
    return terms.negation(terms.as_truth(reader.argument(node.args[0], at, _writes(node))))


_LOGIC = {"and": terms.conjunction, "or": terms.disjunction, "xor": lambda a, b: terms.select(a, terms.negation(b), b)}


@_reads(
    *(f"aten.logical_{name}{mark}.default" for name in _LOGIC for mark in ("", "_")),
    *(f"aten.bitwise_{name}{mark}.{kind}" for name in _LOGIC for mark in ("", "_") for kind in ("Tensor", "Scalar")),
    *(f"aten.__{mark}{name}__.{kind}" for name in _LOGIC for mark in ("", "i") for kind in ("Tensor", "Scalar")),
)
def _logic(reader: Reader, node: Node, at: At) -> Term:
    if dtype(node) != torch.bool:
        raise Unreadable("bits of integers")
    name = op(node).split(".")[1].strip("_").removeprefix("logical_").removeprefix("bitwise_")
    combine = _LOGIC[name if name in _LOGIC else name[1:]]
    return combine(terms.as_truth(reader.argument(node.args[0], at, _writes(node))), terms.as_truth(reader.argument(node.args[1], at)))


def _either(condition: Term, then: Term, other: Term, kind: torch.dtype | None) -> Term:
    truth = terms.as_truth(condition)
    if kind == torch.bool:
        return terms.select(truth, terms.as_truth(then), terms.as_truth(other))
    return terms.choose(truth, terms.as_number(then), terms.as_number(other))


@_reads("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def _where(reader: Reader, node: Node, at: At) -> Term:
    condition, then, other = (reader.argument(arg, at) for arg in node.args)
    return _either(condition, then, other, dtype(node))


@_reads("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", "aten.masked_fill_.Scalar", "aten.masked_fill_.Tensor")
def _masked_fill(reader: Reader, node: Node, at: At) -> Term:
    kept, mask, fill = node.args
    return _either(reader.argument(mask, at), reader.argument(fill, ()), reader.argument(kept, at, _writes(node)), dtype(node))


@_reads("aten.tril.default", "aten.tril_.default", "aten.triu.default", "aten.triu_.default")
def _triangle(reader: Reader, node: Node, at: At) -> Term:
    diagonal = reader.number(argument(node, 1, "diagonal", 0), ())
    kept = terms.compare("<=" if ".tril" in op(node) else ">=", terms.subtract(at[-1], at[-2]), diagonal)
    return _either(kept, reader.element(_source(node), at, _writes(node)), _converted(ZERO, dtype(node)), dtype(node))


# the same elements at other positions


@_reads("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def _expand(reader: Reader, node: Node, at: At) -> Term:
    return reader.argument(node.args[0], at)


@_reads("aten.unsqueeze.default")
def _unsqueeze(reader: Reader, node: Node, at: At) -> Term:
    dim = _dim(node.args[1], len(at))
    return reader.element(_source(node), (*at[:dim], *at[dim + 1 :]))


@_reads(*(VIEWS - {"aten.unsqueeze.default"}))
def _view(reader: Reader, node: Node, at: At) -> Term:
    source = _source(node)
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
    used = [index for index, size in zip(at, after, strict=True) if not same_size(size, 1)]
    result = [ZERO] * len(before)
    if len(axes) == len(used):
        for axis, index in zip(axes, used, strict=True):
            result[axis] = index
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


@_reads("aten.transpose.int", "aten.t.default", "aten.mT.default", "aten.swapaxes.default")
def _transpose(reader: Reader, node: Node, at: At) -> Term:
    order = list(range(len(at)))
    if order[1:]:
        a, b = (-2, -1) if len(node.args) == 1 else (_dim(node.args[1], len(at)), _dim(node.args[2], len(at)))
        order[a], order[b] = order[b], order[a]
    return reader.element(_source(node), tuple(at[i] for i in order))


@_reads("aten.permute.default")
def _permute(reader: Reader, node: Node, at: At) -> Term:
    dims: Any = node.args[1]
    source = [ZERO] * len(at)
    for position, dim in enumerate(dims):
        source[_dim(dim, len(at))] = at[position]
    return reader.element(_source(node), tuple(source))


@_reads("aten.slice.Tensor")
def _slice(reader: Reader, node: Node, at: At) -> Term:
    source, dim = _source(node), _dim(argument(node, 1, "dim", 0), len(at))
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    first: Number = ZERO if start is None else reader.number(start, ())
    least, most = terms.bounds(first) if isinstance(first, Linear) else (None, None)
    if most is not None and most < 0:
        first = terms.add(first, reader.dimension(source, dim))
        least, _ = terms.bounds(first) if isinstance(first, Linear) else (None, None)
        if least is None or least < 0:  # a start before the first element is cut off
            raise Unreadable("a slice with an unknown start")
    elif least is None or least < 0:
        raise Unreadable("a slice with an unknown start")
    return reader.element(source, _moved(at, dim, terms.add(first, terms.multiply(Linear(step), at[dim]))))


@_reads("aten.narrow.default")
def _narrow(reader: Reader, node: Node, at: At) -> Term:
    source, dim, start = _source(node), _dim(node.args[1], len(at)), reader.number(node.args[2], ())
    least, _ = terms.bounds(start) if isinstance(start, Linear) else (None, None)
    if least is None or least < 0:
        raise Unreadable("a slice with an unknown start")
    return reader.element(source, _moved(at, dim, terms.add(start, at[dim])))


@_reads("aten.select.int")
def _select(reader: Reader, node: Node, at: At) -> Term:
    source = _source(node)
    dim, index = _dim(node.args[1], len(shape(source))), node.args[2]
    if not isinstance(index, int):
        raise Unreadable("a selection by a variable")
    position = Linear(index) if index >= 0 else terms.add(Linear(index), reader.dimension(source, dim))
    return reader.element(source, _moved((*at[:dim], ZERO, *at[dim:]), dim, position))


@_reads("aten.flip.default")
def _flip(reader: Reader, node: Node, at: At) -> Term:
    dims: Any = node.args[1]
    for dim in dims:
        axis = _dim(dim, len(at))
        last = terms.subtract(reader.dimension(node, axis), ONE)
        at = _moved(at, axis, terms.subtract(last, at[axis]))
    return reader.element(_source(node), at)


@_reads("aten.cat.default")
def _cat(reader: Reader, node: Node, at: At) -> Term:
    parts: Any = node.args[0]
    dim = _dim(argument(node, 1, "dim", 0), len(at))
    parts = [part for part in parts if len(shape(part)) == len(at)]  # an empty 1-d tensor is allowed beside any others
    *heads, last = parts
    starts = [0]
    for part in heads:
        size = shape(part)[dim]
        if not isinstance(size, int):
            raise Unreadable("a concatenation of symbolic sizes")
        starts.append(starts[-1] + size)
    term: Term = reader.element(last, _moved(at, dim, terms.subtract(at[dim], Linear(starts[-1]))))
    for part, start, end in zip(reversed(heads), reversed(starts[:-1]), reversed(starts[1:]), strict=True):
        inside = terms.compare("<", at[dim], Linear(end))
        here = reader.element(part, _moved(at, dim, terms.subtract(at[dim], Linear(start))))
        term = _either(inside, here, term, dtype(node))
    if heads and any(isinstance(atom, Element) for atom in terms.atoms(term)):
        raise Unreadable("positions outside of the parts")  # an operand of one part would be read past its end
    return term


@_reads("aten.index.Tensor")
def _index(reader: Reader, node: Node, at: At) -> Term:
    source = _source(node)
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
    least, _ = terms.bounds(position) if isinstance(position, Linear) else (None, None)
    if not isinstance(position, Linear) or least is None or least < 0:
        raise Unreadable("an index that may be negative")
    return position
