"""An FFN region whose output is that of all its hidden units and whose gradients go through a part of them, in plain ATen.

The forward pass is the dense one: loss and outputs are exact. Backward is that of the FFN over fewer units (`passes/rewrite/units.py`),
at the hidden values of the dense one: its products are as much smaller, and so is what is kept for them. docs/quality.md has what a
model learns so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from sptc.ir.region import FfnRegion, Projection, UnitSettings
from sptc.passes.rewrite.token_lists import Tokens
from sptc.passes.rewrite.units import Units, counted_first, energy_of, merged, placed
from sptc.passes.rewrite.write_ffn import Ffn, Tensors, insert_ffn

ops = torch.ops.sptc


def rewrite_gradients(region: FfnRegion, settings: UnitSettings, tokens: Tokens, again: bool) -> Node:
    """Insert the FFN before `region.y`; returns the node that replaces it. `tokens` are of the region's graph.

    `again`: what gradients go through is computed from x once more, as in a checkpoint, where the dense values are not there any more.
    """
    return insert_ffn(region, _with_thin_gradients, settings, again, operands=(tokens,))


def _with_thin_gradients(region: FfnRegion, settings: UnitSettings, again: bool, t: Tensors, tokens: Tokens) -> Tensor:
    """Outputs [N, d_out]; rows that nothing reads are zeros."""
    apart, left_out = settings.context is not None, tokens.order is not None
    rows = counted_first(tokens) if apart and left_out else tokens.order
    whole = _Whole(rows)
    value = Ffn(region, t, whole).output()
    first: list[Tensor] = []

    def through(rows: Tensor | None, places: Tensor | None, sample: Tensor | None, units: int) -> Tensor:
        part = _Through(rows, places, _chosen(region, t, whole, sample, units), whole, again)
        gradient = Ffn(region, t, part).output()
        first.extend(part.first)
        return gradient

    if settings.context is None:
        gradient = through(rows, None, None if left_out else tokens.sample, settings.units)
    else:
        places = tokens.among or tokens
        counted = through(tokens.counted, places.counted, places.counted_sample, settings.units)
        context = through(tokens.context, places.context, places.context_sample, settings.context)
        gradient = torch.cat([counted, context]) if left_out else merged(tokens, counted, context)
    return placed(t[region.x], rows, ops.with_gradient_of(ops.after(value.detach(), first), gradient))


class _Whole(Units):
    """All units of some tokens (None: all); what is computed on the way is remembered."""

    def __init__(self, rows: Tensor | None) -> None:
        super().__init__(rows, None)
        self.ups: dict[Node, Tensor] = {}
        self.hidden: Tensor
        self.low: Tensor
        self.masks: dict[str, Tensor] = {}

    def up(self, projection: Projection, u: Tensor) -> Tensor:
        self.ups[projection.y] = u
        return u

    def weighed(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden

    def dropout(self, hidden: Tensor, p: float, of: str) -> Tensor:
        """By a mask of its own, which gradients are to be cut by as well."""
        self.masks[of] = torch.nn.functional.dropout(torch.ones_like(hidden), p)
        return hidden * self.masks[of]

    def whole(self, low: Tensor) -> Tensor:
        self.low = low
        return low


class _Through(Units):
    """Some tokens and some units, at the values that they have in `whole`."""

    def __init__(self, rows: Tensor | None, places: Tensor | None, units: Tensor | None, whole: _Whole, again: bool) -> None:
        """`places`: those of `rows` among the rows of `whole`; None: all of them."""
        super().__init__(rows, units, again)
        self._places, self._whole = places, whole
        self.first = [] if units is None else [units]  # what only backward reads, and the forward pass has at hand

    def up(self, projection: Projection, u: Tensor) -> Tensor:
        if self._again:
            return super().up(projection, u)
        values = self._part(self._whole.ups[projection.y])
        self.first.append(values)
        return ops.with_gradient_of(values, u)  # type: ignore[no-any-return]

    def dropout(self, hidden: Tensor, p: float, of: str) -> Tensor:
        return hidden * self._part(self._whole.masks[of])

    def whole(self, low: Tensor) -> Tensor:
        """All that the adapter has of the hidden values, so that the gradient of its B is exact."""
        kept = ops.keep(self._at_places(self._whole.low.detach()))
        self.first.append(kept)
        return ops.with_gradient_of(kept, low)  # type: ignore[no-any-return]

    def _part(self, value: Tensor) -> Tensor:
        """Of values [N, hidden], those of the tokens and units."""
        value = self._at_places(value.detach())
        return value if self.chosen is None else value.index_select(1, self.chosen)

    def _at_places(self, value: Tensor) -> Tensor:
        return value if self._places is None else value.index_select(0, self._places)


def _chosen(region: FfnRegion, t: Tensors, whole: _Whole, sample: Tensor | None, units: int) -> Tensor | None:
    """The `units` units of the greatest energy over the tokens of `sample`, as in the FFN over fewer units; None for all."""
    if units == region.hidden:
        return None
    hidden = whole.hidden.detach()
    rows = ops.sample_tokens(hidden, None) if sample is None else sample
    chosen: Tensor = ops.choose_units(energy_of(region, t, hidden.index_select(0, rows)), units)
    return chosen
