"""An FFN region whose output is that of all its hidden units and whose gradients go through a part of them, in plain ATen.

The forward pass is the dense one: loss and outputs are exact. Backward is that of the FFN over fewer units (`passes/rewrite/units.py`),
at the hidden values of the dense one: its products are as much smaller, and so is what is kept for them. docs/quality.md has what a
model learns so.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from sptc.ir.region import FfnRegion, Projection, UnitSettings
from sptc.passes.find.counted import fits
from sptc.passes.graph.build import Builder, aten
from sptc.passes.rewrite.token_lists import Tokens
from sptc.passes.rewrite.units import Units, counted_first, energy_of, merged, placed
from sptc.passes.rewrite.write_ffn import Ffn

ops = torch.ops.sptc


def rewrite_gradients(region: FfnRegion, settings: UnitSettings, tokens: Tokens, again: bool) -> Node:
    """Insert the FFN before `region.y`; returns the node that replaces it. `tokens` are of the region's graph.

    `again`: what gradients go through is computed from x once more, as in a checkpoint, where the dense values are not there any more.
    """
    b = Builder(region.y)
    apart, left_out = settings.context is not None, tokens.order is not None
    rows = counted_first(b, tokens) if apart and left_out else tokens.order
    whole = _Whole(b, rows)
    value = Ffn(region, whole).output()
    first: list[Node] = []

    def through(rows: Node | None, places: Node | None, sample: Node | None, units: int) -> Node:
        part = _Through(b, rows, places, _chosen(b, region, whole, sample, units), whole, again)
        gradient = Ffn(region, part).output()
        first.extend(part.first)
        return gradient

    if settings.context is None:
        gradient = through(rows, None, tokens.sample if not left_out and fits(tokens.padded, region) else None, settings.units)
    else:
        places = tokens.among or tokens
        counted = through(tokens.counted, places.counted, places.counted_sample, settings.units)
        context = through(tokens.context, places.context, places.context_sample, settings.context)
        gradient = b.call(aten.cat.default, [counted, context]) if left_out else merged(b, tokens, counted, context)
    value = b.call(ops.after.default, b.call(aten.detach.default, value), first)
    return placed(b, region, rows, b.call(ops.with_gradient_of.default, value, gradient))


class _Whole(Units):
    """All units of some tokens (None: all); what is computed on the way is remembered."""

    def __init__(self, b: Builder, rows: Node | None) -> None:
        super().__init__(b, rows, None)
        self.ups: dict[Node, Node] = {}
        self.hidden: Node | None = None
        self.low: Node | None = None
        self.masks: dict[str, Node] = {}

    def up(self, projection: Projection, u: Node) -> Node:
        self.ups[projection.y] = u
        return u

    def weighed(self, hidden: Node) -> Node:
        self.hidden = hidden
        return hidden

    def dropout(self, hidden: Node, p: float, of: str) -> Node:
        """By a mask of its own, which gradients are to be cut by as well."""
        self.masks[of] = self.b.call(aten.dropout.default, self.b.call(aten.ones_like.default, hidden), p, True)
        return self.b.call(aten.mul.Tensor, hidden, self.masks[of])

    def whole(self, low: Node) -> Node:
        self.low = low
        return low


class _Through(Units):
    """Some tokens and some units, at the values that they have in `whole`."""

    def __init__(self, b: Builder, rows: Node | None, places: Node | None, units: Node | None, whole: _Whole, again: bool) -> None:
        """`places`: those of `rows` among the rows of `whole`; None: all of them."""
        super().__init__(b, rows, units)
        self._places, self._whole, self._again = places, whole, again
        self.first = [] if units is None else [units]  # what only backward reads, and the forward pass has at hand

    def up(self, projection: Projection, u: Node) -> Node:
        if self._again:
            return u
        values = self._part(self._whole.ups[projection.y])
        self.first.append(values)
        return self.b.call(ops.with_gradient_of.default, values, u)

    def dropout(self, hidden: Node, p: float, of: str) -> Node:
        return self.b.call(aten.mul.Tensor, hidden, self._part(self._whole.masks[of]))

    def whole(self, low: Node) -> Node:
        """All that the adapter has of the hidden values, so that the gradient of its B is exact."""
        assert self._whole.low is not None
        kept = self.b.call(ops.keep.default, self._at_places(self.b.call(aten.detach.default, self._whole.low)))
        self.first.append(kept)
        return self.b.call(ops.with_gradient_of.default, kept, low)

    def _part(self, value: Node) -> Node:
        """Of values [N, hidden], those of the tokens and units."""
        value = self._at_places(self.b.call(aten.detach.default, value))
        return value if self.chosen is None else self.b.call(aten.index_select.default, value, 1, self.chosen)

    def _at_places(self, value: Node) -> Node:
        return value if self._places is None else self.b.call(aten.index_select.default, value, 0, self._places)


def _chosen(b: Builder, region: FfnRegion, whole: _Whole, sample: Node | None, units: int) -> Node | None:
    """The `units` units of the greatest energy over the tokens of `sample`, as in the FFN over fewer units; None for all."""
    if units == region.hidden:
        return None
    assert whole.hidden is not None
    hidden = b.call(aten.detach.default, whole.hidden)
    if sample is None:
        sample = b.call(ops.sample_tokens.default, hidden, None)
    energy = energy_of(b, region, b.call(aten.index_select.default, hidden, 0, sample))
    return b.call(ops.choose_units.default, energy, units)
