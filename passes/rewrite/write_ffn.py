"""Write an FFN region once more for a part of its tokens and hidden units, in plain ATen.

y = down(act(up_1(x), ...)), adapters, biases and dropout cut alike. The activation's own nodes run again on what is left, since none of
them mixes units. Products stay ordinary ones, and the rest is Inductor's to fuse. What a part is, and by which products it is computed,
is a `Part`'s to say.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from sptc.ir.region import FfnRegion, Lora, Projection
from sptc.passes.graph.build import Builder, aten
from sptc.passes.graph.elementwise import functional
from sptc.passes.graph.pattern import TRANSPARENT, VIEWS, dtype, op, value


class Part:
    """All tokens and all hidden units; others override what they do otherwise. Rows are what hidden values are computed for, [n, width]."""

    def __init__(self, b: Builder) -> None:
        self.b = b

    def tokens(self, x: Node) -> Node:
        """An operand [..., features] of the region as `enter` wants it."""
        return self.b.rows(x)

    def units(self, operand: Node, dim: int, of: tuple[int, int] | None) -> Node:
        """What belongs to the units of a weight, bias or adapter whose dimension `dim` is the hidden one, or its range `of`."""
        return operand if of is None else self.b.call(aten.slice.Tensor, operand, dim, *of)

    def enter(self, x: Node, weight: Node, bias: Node | None = None) -> Node:
        """Hidden values of the rows: x, from `tokens`, by a weight [units, features]."""
        return self.b.call(aten.linear.default, x, weight, bias)

    def leave(self, hidden: Node, weight: Node, bias: Node | None = None) -> Node:
        """Outputs of the tokens: hidden values by a weight [features, units]."""
        return self.b.call(aten.linear.default, hidden, weight, bias)

    def up(self, projection: Projection, u: Node) -> Node:
        """What the activation is given of a projection, `u` being its values with adapter and bias."""
        return u

    def weighed(self, hidden: Node) -> Node:
        """Hidden values as they count."""
        return hidden

    def dropout(self, hidden: Node, p: float, of: Literal["hidden", "adapter"]) -> Node:
        """Hidden values after the FFN's own dropout, or after that of the down projection's adapter."""
        return self.b.call(aten.dropout.default, hidden, p, True)

    def whole(self, low: Node) -> Node:
        """What the adapter of the down projection has of the hidden values, as if of all units."""
        return low


class Ffn:
    """Writes the region for a part of it."""

    def __init__(self, region: FfnRegion, part: Part, dropout: bool = True) -> None:
        self._b, self._region, self._part, self._dropout = part.b, region, part, dropout
        self._taken: dict[Node, Node] = {}

    def output(self) -> Node:
        """The output of the part's tokens, [tokens, d_out]."""
        b, down, part = self._b, self._region.down, self._part
        hidden = self.hidden()
        y = part.leave(hidden, self._weight(down, 1), down.bias)
        if down.lora is None:
            return y
        low = part.dropout(hidden, down.lora.dropout_p, "adapter") if down.lora.dropout_p else hidden
        low = part.whole(part.leave(b.cast(low, dtype(down.lora.a)), part.units(down.lora.a, 1, None)))
        return b.call(aten.add.Tensor, y, b.call(aten.linear.default, self._scaled(low, down.lora), down.lora.b))

    def hidden(self) -> Node:
        """What the down projection is given, [rows, width]."""
        known = {up.y: self._up(up) for up in self._region.ups}
        hidden = self._part.weighed(self._again(self._region.down.x, known))
        p = self._region.dropout_p if self._dropout else 0.0
        return self._part.dropout(hidden, p, "hidden") if p else hidden

    def _again(self, node: Node, known: dict[Node, Node]) -> Node:
        """The activation's nodes once more; backward keeps what they are computed from. Views and copies have nothing to do on rows."""
        if not isinstance(value(node), torch.Tensor):
            return node  # a number
        if node not in known:
            name = op(node)
            if name in VIEWS or name in TRANSPARENT or name in ("aten.dropout.default", "aten.dropout_.default"):
                known[node] = self._again(node.args[0], known)  # type: ignore[arg-type]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._again(n, known))
                known[node] = self._b.recomputed(self._b.call(functional(node.target), *args, **kwargs))
        return known[node]

    def _up(self, up: Projection) -> Node:
        b, part = self._b, self._part
        bias = None if up.bias is None else part.units(up.bias, 0, up.rows)
        y = part.enter(self._tokens(self._region.x), self._weight(up, 0), bias)
        if up.lora is not None:
            low = self._scaled(self._tokens(up.lora.low), up.lora)
            y = b.call(aten.add.Tensor, y, part.enter(low, part.units(up.lora.b, 0, up.rows)))
        return part.up(up, b.cast(y, dtype(up.y)))

    def _scaled(self, low: Node, lora: Lora) -> Node:
        """What an adapter's B is given."""
        scaled = low if lora.scaling == 1.0 else self._b.call(aten.mul.Tensor, low, lora.scaling)
        return self._b.cast(scaled, dtype(lora.b))

    def _tokens(self, node: Node) -> Node:
        if node not in self._taken:
            self._taken[node] = self._part.tokens(node)
        return self._taken[node]

    def _weight(self, projection: Projection, dim: int) -> Node:
        """The weight as [out, in] with its units, which are dimension `dim` of that."""
        weight = self._part.units(projection.weight, 1 - dim if projection.transposed else dim, projection.rows)
        return self._b.call(aten.t.default, weight) if projection.transposed else weight
