"""An FFN region over fewer hidden units: one set of units for many tokens, chosen by their energy, in plain ATen.

y = down[:, S] act(up[S] x), adapters and biases cut alike. The activation's own nodes run again on fewer columns, since none of them mixes
units. Products stay ordinary ones of the libraries, and the rest is Inductor's to fuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from sptc.passes.build import Builder, aten
from sptc.passes.counted import fits
from sptc.passes.pattern import TRANSPARENT, VIEWS, dtype, op, value
from sptc.passes.token_lists import Tokens
from sptc.region import FfnRegion, Lora, Projection, UnitSettings

ops = torch.ops.sptc


def rewrite_units(region: FfnRegion, settings: UnitSettings, tokens: Tokens) -> Node:
    """Insert the FFN over fewer units before `region.y`; returns the node that replaces it. `tokens` are of the region's graph."""
    b = Builder(region.y)
    if settings.context is None or settings.whole:
        sample = tokens.sample if fits(tokens.padded, region) else None
        y = _Ffn(b, region).over(_chosen(b, region, sample, settings.units))
        return b.cast(b.like_rows_of(y, region.x, region.y), dtype(region.y))
    counted = _Ffn(b, region, tokens.counted).over(_chosen(b, region, tokens.counted_sample, settings.units))
    context = _Ffn(b, region, tokens.context).over(_chosen(b, region, tokens.context_sample, settings.context))
    both, order = b.call(aten.cat.default, [counted, context]), b.call(aten.cat.default, [tokens.counted, tokens.context])
    y = b.call(aten.index_copy.default, b.call(aten.empty_like.default, both), 0, order, both)
    return b.cast(b.like_rows_of(y, region.x, region.y), dtype(region.y))


def _chosen(b: Builder, region: FfnRegion, sample: Node | None, units: int) -> Node | None:
    """The `units` hidden units of the largest energy, int64 in ascending order; None for all of them.

    A unit's energy is the sum over sampled tokens of h_j^2, times the squared norm of column j of the down projection: what leaving it out
    changes in the output, if columns are taken for orthogonal.
    """
    if units == region.hidden:
        return None
    if sample is None:
        sample = b.call(ops.sample_tokens.default, b.call(aten.detach.default, b.rows(region.x)), None)
    hidden = _squares(b, _Ffn(b, region, sample, dropout=False).hidden(None), 0)
    columns = _squares(b, region.down.weight, 1 if region.down.transposed else 0)
    energy = b.call(aten.detach.default, b.call(aten.mul.Tensor, hidden, columns))
    return b.call(ops.choose_units.default, energy, units)


def _squares(b: Builder, node: Node, dim: int) -> Node:
    node = b.single(node)
    return b.call(aten.sum.dim_IntList, b.call(aten.mul.Tensor, node, node), [dim])


class _Ffn:
    """Writes the region for some of its tokens (None: all) and some of its units."""

    def __init__(self, b: Builder, region: FfnRegion, rows: Node | None = None, dropout: bool = True) -> None:
        self._b, self._region, self._rows, self._dropout = b, region, rows, dropout
        self._taken: dict[Node, Node] = {}

    def over(self, units: Node | None) -> Node:
        """The output over `units` (None: all), [n, d_out]."""
        b, down = self._b, self._region.down
        hidden = self.hidden(units)
        y = b.call(aten.linear.default, hidden, self._weight(down, units, 1), down.bias)
        if down.lora is None:
            return y
        low = b.call(aten.dropout.default, hidden, down.lora.dropout_p, True) if down.lora.dropout_p else hidden
        low = b.call(aten.linear.default, b.cast(low, dtype(down.lora.a)), _select(b, down.lora.a, 1, units))
        return self._adapted(y, low, down.lora, down.lora.b)

    def hidden(self, units: Node | None) -> Node:
        """What the down projection is given, [n, len(units)]."""
        known = {up.y: self._up(up, units) for up in self._region.ups}
        return self._again(self._region.down.x, known)

    def _again(self, node: Node, known: dict[Node, Node]) -> Node:
        """The activation's nodes once more; backward keeps what they are computed from. Views and copies have nothing to do on rows."""
        if not isinstance(value(node), torch.Tensor):
            return node  # a number
        if node not in known:
            name = op(node)
            if name in VIEWS or name in TRANSPARENT:
                known[node] = self._again(node.args[0], known)  # type: ignore[arg-type]
            elif name in ("aten.dropout.default", "aten.dropout_.default"):
                below = self._again(node.args[0], known)  # type: ignore[arg-type]
                p = self._region.dropout_p if self._dropout else 0.0
                known[node] = self._b.call(aten.dropout.default, below, p, True) if p else below
            else:
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._again(n, known))
                known[node] = self._b.recomputed(self._b.call(node.target, *args, **kwargs))
        return known[node]

    def _up(self, up: Projection, units: Node | None) -> Node:
        b = self._b
        y = b.call(aten.linear.default, self._take(self._region.x), self._weight(up, units, 0), self._of_units(up, up.bias, units))
        if up.lora is not None:
            y = self._adapted(y, self._take(up.lora.low), up.lora, self._of_units(up, up.lora.b, units))
        return b.cast(y, dtype(up.y))

    def _adapted(self, y: Node, low: Node, lora: Lora, to: Any) -> Node:
        """y plus what an adapter adds, from `low` [n, r] by the rows `to` of its B."""
        b = self._b
        if lora.scaling != 1.0:
            low = b.call(aten.mul.Tensor, low, lora.scaling)
        return b.call(aten.add.Tensor, y, b.call(aten.linear.default, b.cast(low, dtype(to)), to))

    def _take(self, node: Node) -> Node:
        """The region's tokens of an operand [..., features], as rows."""
        if node not in self._taken:
            rows = self._b.rows(node)
            self._taken[node] = rows if self._rows is None else self._b.call(aten.index_select.default, rows, 0, self._rows)
        return self._taken[node]

    def _of_units(self, up: Projection, operand: Node | None, units: Node | None, dim: int = 0) -> Node | None:
        """Of a bias, weight or adapter of an up projection, what belongs to the units; `up` may be a range of a wider projection."""
        if operand is None:
            return None
        if units is None:
            return operand if up.rows is None else self._b.call(aten.slice.Tensor, operand, dim, *up.rows)
        if up.rows is not None and up.rows[0]:
            units = self._b.call(aten.add.Tensor, units, up.rows[0])
        return _select(self._b, operand, dim, units)

    def _weight(self, projection: Projection, units: Node | None, dim: int) -> Node:
        """The weight as [out, in] with its units, which are dimension `dim` of that."""
        weight = self._of_units(projection, projection.weight, units, 1 - dim if projection.transposed else dim)
        assert weight is not None
        return self._b.call(aten.t.default, weight) if projection.transposed else weight


def _select(b: Builder, operand: Node, dim: int, units: Node | None) -> Node:
    """What belongs to the units of a weight or bias: gathered once more in backward, which costs less than a copy of every layer's."""
    return operand if units is None else b.recomputed(b.call(aten.index_select.default, operand, dim, units))
