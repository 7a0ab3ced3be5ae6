"""An FFN region over fewer hidden units: one set of units for many tokens, chosen by their energy, in plain ATen."""

from __future__ import annotations

import torch
from torch.fx import Node

from sptc.ir.region import FfnRegion, UnitSettings
from sptc.passes.find.counted import fits
from sptc.passes.graph.build import Builder, aten
from sptc.passes.graph.pattern import dtype, shape
from sptc.passes.rewrite.token_lists import Tokens
from sptc.passes.rewrite.write_ffn import Ffn, Part

ops = torch.ops.sptc


def rewrite_units(region: FfnRegion, settings: UnitSettings, tokens: Tokens) -> Node:
    """Insert the FFN over fewer units before `region.y`; returns the node that replaces it. `tokens` are of the region's graph.

    Rows that nothing reads are zeros.
    """
    b = Builder(region.y)
    if settings.context is None or settings.all_units:
        sample = tokens.sample if settings.rows == "counted" or fits(tokens.padded, region) else None
        y = Ffn(region, Units(b, tokens.order, _chosen(b, region, sample, settings.units))).output()
        return placed(b, region, tokens.order, y)
    counted = Ffn(region, Units(b, tokens.counted, _chosen(b, region, tokens.counted_sample, settings.units))).output()
    context = Ffn(region, Units(b, tokens.context, _chosen(b, region, tokens.context_sample, settings.context))).output()
    if tokens.order is None:
        return placed(b, region, None, merged(b, tokens, counted, context))
    return placed(b, region, counted_first(b, tokens), b.call(aten.cat.default, [counted, context]))


def counted_first(b: Builder, tokens: Tokens) -> Node:
    """Rows of the tokens that count, then those of the others that are computed."""
    return b.call(aten.cat.default, [tokens.counted, tokens.context])


def merged(b: Builder, tokens: Tokens, counted: Node, context: Node) -> Node:
    """Rows of the tokens that count and of all others, in the order of the tokens."""
    both = b.call(aten.cat.default, [counted, context])
    return b.call(aten.index_copy.default, b.call(aten.empty_like.default, both), 0, counted_first(b, tokens), both)


def placed(b: Builder, region: FfnRegion, rows: Node | None, y: Node) -> Node:
    """Outputs of some rows (None: all) as the region's output: those of the other tokens are zeros."""
    if rows is not None:
        zeros = b.call(aten.new_zeros.default, y, [b.size(b.rows(region.x), 0), shape(y)[-1]])
        y = b.call(aten.index_copy.default, zeros, 0, rows, y)
    return b.cast(b.like_rows_of(y, region.x, region.y), dtype(region.y))


class Units(Part):
    """Some tokens (their row numbers; None: all) and some units (their numbers; None: all)."""

    def __init__(self, b: Builder, rows: Node | None, units: Node | None) -> None:
        super().__init__(b)
        self._rows, self.chosen = rows, units

    def tokens(self, x: Node) -> Node:
        rows = self.b.rows(x)
        return rows if self._rows is None else self.b.call(aten.index_select.default, rows, 0, self._rows)

    def units(self, operand: Node, dim: int, of: tuple[int, int] | None) -> Node:
        """Gathered once more in backward, which costs less than a copy of every layer's weights."""
        if self.chosen is None:
            return super().units(operand, dim, of)
        numbers = self.chosen if of is None or of[0] == 0 else self.b.call(aten.add.Tensor, self.chosen, of[0])
        return self.b.recomputed(self.b.call(aten.index_select.default, operand, dim, numbers))


def _chosen(b: Builder, region: FfnRegion, sample: Node | None, units: int) -> Node | None:
    """The `units` hidden units of the largest energy, int64 in ascending order; None for all of them.

    A unit's energy is the sum over sampled tokens of h_j^2, times the squared norm of column j of the down projection: what leaving it out
    changes in the output, if columns are taken for orthogonal.
    """
    if units == region.hidden:
        return None
    if sample is None:
        sample = b.call(ops.sample_tokens.default, b.call(aten.detach.default, b.rows(region.x)), None)
    return b.call(ops.choose_units.default, energy_of(b, region, Ffn(region, Units(b, sample, None), dropout=False).hidden()), units)


def energy_of(b: Builder, region: FfnRegion, hidden: Node) -> Node:
    """Energies of hidden units from their values at some tokens: fp32 [hidden], from [n, hidden]."""
    columns = _squares(b, region.down.weight, 1 if region.down.transposed else 0)
    return b.call(aten.detach.default, b.call(aten.mul.Tensor, _squares(b, hidden, 0), columns))


def _squares(b: Builder, node: Node, dim: int) -> Node:
    node = b.single(node)
    return b.call(aten.sum.dim_IntList, b.call(aten.mul.Tensor, node, node), [dim])
