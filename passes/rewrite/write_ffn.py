"""Compute an FFN region once more for a part of its tokens and hidden units.

y = down(act(up_1(x), ...)), adapters, biases and dropout cut alike. The activation's own nodes run again on what is left, since none of
them mixes units. Products stay ordinary ones, and the rest is Inductor's to fuse. What a part is, and by which products it is computed,
is a `Part`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.fx.node import map_arg
from torch.nn.functional import dropout, linear, pad

from sptc.ir.region import FfnRegion, Lora, Projection
from sptc.passes.graph.elementwise import functional
from sptc.passes.graph.insert import as_rows, cast, insert, kept, recomputed
from sptc.passes.graph.pattern import TRANSPARENT, VIEWS, dtype, exchanged, op, same_size, shape, value

Tensors = Mapping[Node | None, Any]
"""What the operands of a region are while its form is traced: tensors, and numbers of dynamic shapes; None for None."""


def insert_ffn(region: FfnRegion, form: Callable[..., Tensor], *settings: Any, operands: tuple[Any, ...] = ()) -> Node:
    """Insert a form of the region before its `y`; returns the node that replaces `y`, of its shape and dtype.

    Args:
        form: gives the outputs of all tokens, [N, d_out], from the region, `settings`, its `Tensors`, and `operands`.
        settings: values; the nodes in them are among the `Tensors` too.
        operands: as `passes.graph.insert.insert` takes them.
    """
    projections = (*region.ups, region.down)
    adapters = [p.lora for p in projections if p.lora is not None]
    numbers = {n for node in region.nodes for n in node.all_input_nodes if isinstance(value(n), torch.SymInt | torch.SymFloat)}
    named = [region.x, *(n for p in projections for n in (p.weight, p.bias)), *(n for a in adapters for n in (a.low, a.a, a.b, a.scaling))]
    trained = [n for held in settings if is_dataclass(held) for n in vars(held).values()]
    nodes = {
        **kept(region.y, [n for n in (*named, *sorted(numbers)) if isinstance(n, Node)]),
        **{n: n for n in trained if isinstance(n, Node)},
    }
    inside = sorted(region.nodes)
    number: Mapping[Node, Any] = {n: i for i, n in enumerate((*nodes, *inside))}
    spelled = tuple(repr((n.target, map_arg((n.args, n.kwargs), number.get), dtype(n), shape(n))) for n in inside)
    lead = shape(region.y)[:-1]
    of_x = len(shape(region.x)) == len(lead) + 1 and all(map(same_size, shape(region.x), lead))

    def run(tensors: Mapping[Node, Any], sizes: Iterable[Any], *rest: Any) -> Tensor:
        y = form(region, *settings, {None: None, **tensors}, *rest)
        if len(lead) != 1:
            y = y.reshape(*(tensors[region.x].shape[:-1] if of_x else sizes), y.shape[-1])
        return cast(y, dtype(region.y))

    sizes = [] if of_x else [s if isinstance(s, int) else _known(s, region.y) for s in lead]
    alike = (form, spelled, exchanged((replace(region, site=None), settings), number))  # type: ignore[arg-type]
    result: Node = insert(region.y, run, nodes, sizes, *operands, alike=alike)
    return result


def _known(size: torch.SymInt, y: Node) -> Node | int:
    """A node before `y` that computes a symbolic size; -1, once, for a size that only `y` has."""
    for node in y.graph.nodes:
        if node is y:
            break
        if isinstance(value(node), torch.SymInt) and value(node).node.expr == size.node.expr:
            return node
    return -1


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.

    Rows of one number, as of an adapter of rank 1, whose count is data get a second one of 0: of a matrix of one column autograd asks
    whether it has one row, and the count is not known when it asks.
    """
    if x.shape[-1] == 1 and has_free_unbacked_symbols(x):
        x, weight = pad(x, (0, 1)), pad(weight, (0, 1))
    return linear(x, weight, bias)


class Part:
    """All tokens and all hidden units; others override what they do otherwise. Rows are what hidden values are computed for, [n, width]."""

    def tokens(self, x: Tensor) -> Tensor:
        """An operand [..., features] of the region as `enter` wants it."""
        return as_rows(x)

    def units(self, operand: Tensor, dim: int, of: tuple[int, int] | None) -> Tensor:
        """What belongs to the units of a weight, bias or adapter whose dimension `dim` is the hidden one, or its range `of`."""
        return operand if of is None else torch.ops.aten.slice(operand, dim, *of)

    def enter(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Hidden values of the rows: x, from `tokens`, by a weight [units, features]."""
        return product(x, weight, bias)

    def leave(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs of the tokens: hidden values by a weight [features, units]."""
        return product(hidden, weight, bias)

    def up(self, projection: Projection, u: Tensor) -> Tensor:
        """What the activation is given of a projection, `u` being its values with adapter and bias."""
        return u

    def weighed(self, hidden: Tensor) -> Tensor:
        """Hidden values as they count."""
        return hidden

    def dropout(self, hidden: Tensor, p: float, of: Literal["hidden", "adapter"]) -> Tensor:
        """Hidden values after the FFN's own dropout, or after that of the down projection's adapter."""
        return dropout(hidden, p)

    def whole(self, low: Tensor) -> Tensor:
        """What the adapter of the down projection has of the hidden values, as if of all units."""
        return low


class Ffn:
    """The region for a part of it."""

    def __init__(self, region: FfnRegion, tensors: Tensors, part: Part, dropout: bool = True) -> None:
        self._region, self._tensors, self._part, self._dropout = region, tensors, part, dropout
        self._taken: dict[Node, Tensor] = {}

    def output(self) -> Tensor:
        """The output of the part's tokens, [tokens, d_out]."""
        return self.down(self.hidden(), self._tensors[self._region.down.bias])

    def down(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs [tokens, d_out] of hidden values [rows, width], by the down projection and its adapter."""
        down, part, t = self._region.down, self._part, self._tensors
        y = part.leave(hidden, self._weight(down, 1), bias)
        if down.lora is None:
            return y
        a = part.units(t[down.lora.a], 1, None)
        low = part.dropout(hidden, down.lora.dropout_p, "adapter") if down.lora.dropout_p and self._dropout else hidden
        low = part.whole(part.leave(cast(low, a.dtype), a))
        return y + product(self._scaled(low, down.lora), t[down.lora.b])

    def hidden(self) -> Tensor:
        """What the down projection is given, [rows, width]."""
        known: dict[Any, Any] = {**self._tensors, **{up.y: self._up(up) for up in self._region.ups}}
        hidden = self._part.weighed(self._again(self._region.down.x, known))
        p = self._region.dropout_p if self._dropout else 0.0
        return self._part.dropout(hidden, p, "hidden") if p else hidden

    def _again(self, node: Node, known: dict[Any, Any]) -> Any:
        """The activation's nodes once more; backward keeps what they are computed from. Of views and copies, casts alone count."""
        if node not in known:
            name = op(node)
            if name in VIEWS or name in TRANSPARENT or name in ("aten.dropout.default", "aten.dropout_.default"):
                before = self._again(node.args[0], known)
                known[node] = recomputed(cast(before, dtype(node))) if dtype(node) != before.dtype else before
            else:
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._again(n, known))
                known[node] = recomputed(functional(node.target)(*args, **kwargs))
        return known[node]

    def _up(self, up: Projection) -> Tensor:
        part, t = self._part, self._tensors
        bias = None if up.bias is None else part.units(t[up.bias], 0, up.rows)
        y = part.enter(self._tokens(self._region.x), self._weight(up, 0), bias)
        if up.lora is not None:
            low = self._scaled(self._tokens(up.lora.low), up.lora)
            y = y + part.enter(low, part.units(t[up.lora.b], 0, up.rows))
        return part.up(up, cast(y, dtype(up.y)))

    def _scaled(self, low: Tensor, lora: Lora) -> Tensor:
        """What an adapter's B is given."""
        if lora.scaling != 1.0:
            low = low * (self._tensors[lora.scaling] if isinstance(lora.scaling, Node) else lora.scaling)
        return cast(low, dtype(lora.b))

    def _tokens(self, node: Node) -> Tensor:
        if node not in self._taken:
            self._taken[node] = self._part.tokens(self._tensors[node])
        return self._taken[node]

    def _weight(self, projection: Projection, dim: int) -> Tensor:
        """The weight as [out, in] with its units, which are dimension `dim` of that."""
        stored = self._tensors[projection.weight]
        weight = self._part.units(stored, 1 - dim if projection.transposed else dim, projection.rows)
        return weight.t() if projection.transposed else weight
