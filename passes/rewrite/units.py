"""An FFN region over fewer hidden units: one set of units for many tokens, chosen by their energy, in plain ATen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from sptc.ir.region import FfnRegion, Projection, UnitSettings
from sptc.passes.graph.insert import as_rows, cast, recomputed
from sptc.passes.rewrite.chunks import Chunked, in_chunks
from sptc.passes.rewrite.token_lists import Tokens
from sptc.passes.rewrite.write_ffn import Ffn, Part, Tensors, insert_ffn, product

ops = torch.ops.sptc
LeftOut = tuple[Tensor, Tensor]  # a [rank, d], b [d_out, rank]: what left-out units give is taken to be x a^T b^T


def rewrite_units(region: FfnRegion, settings: UnitSettings, tokens: Tokens) -> Node:
    """Insert the FFN over fewer units before `region.y`; returns the node that replaces it. `tokens` are of the region's graph."""
    return insert_ffn(region, _over_units, settings, _chunked(region, settings), operands=(tokens,))


def _chunked(region: FfnRegion, settings: UnitSettings) -> tuple[Chunked, ...]:
    """The forms in chunks of tokens, by the number of units that they keep; none where all tokens are computed at once."""
    if settings.chunk is None:
        return ()
    several = dict.fromkeys(units for units in (settings.units, settings.context) if units is not None)
    return tuple(in_chunks(region, settings.chunk, lambda chosen: Units(None, chosen), units) for units in several)


def _over_units(region: FfnRegion, settings: UnitSettings, chunked: tuple[Chunked, ...], t: Tensors, tokens: Tokens) -> Tensor:
    """Outputs [N, d_out]; rows that nothing reads are zeros. `chunked`: in chunks of tokens, by the number of units; none: all at once."""

    def of(rows: Tensor | None, sample: Tensor | None, units: int) -> Tensor:
        chosen, left_out = (None, None) if units == region.hidden else _chosen(region, t, sample, units, settings.rank)
        part = Units(rows, chosen, settings.recompute)
        form = next((form for form in chunked if form.units == units), None)
        y = form(t, part, chosen) if form is not None else Ffn(region, t, part).output()
        if left_out is None:
            return y
        a, b = left_out
        return y + cast(product(product(part.tokens(t[region.x]), a), b), y.dtype)

    if settings.context is None or settings.all_units:
        return placed(t[region.x], tokens.order, of(tokens.order, tokens.sample, settings.units))
    counted = of(tokens.counted, tokens.counted_sample, settings.units)
    context = of(tokens.context, tokens.context_sample, settings.context)
    if tokens.order is None:
        return merged(tokens, counted, context)
    return placed(t[region.x], counted_first(tokens), torch.cat([counted, context]))


def counted_first(tokens: Tokens) -> Tensor:
    """Rows of the tokens that count, then those of the others that are computed."""
    return torch.cat([tokens.counted, tokens.context])


def merged(tokens: Tokens, counted: Tensor, context: Tensor) -> Tensor:
    """Rows [N, d] of the tokens that count and of all others, in the order of the tokens."""
    both = torch.cat([counted, context])
    return torch.empty_like(both).index_copy(0, counted_first(tokens), both)


def placed(x: Tensor, rows: Tensor | None, y: Tensor) -> Tensor:
    """Outputs of some rows (None: all) of x [..., d], as those of all: others are zeros."""
    return y if rows is None else y.new_zeros(as_rows(x).shape[0], y.shape[-1]).index_copy(0, rows, y)


class Units(Part):
    """Some tokens (their row numbers; None: all) and some units (their numbers; None: all).

    `again`: backward computes hidden values again from the tokens.
    """

    def __init__(self, rows: Tensor | None, units: Tensor | None, again: bool = False) -> None:
        self._rows, self.chosen, self._again = rows, units, again

    def tokens(self, x: Tensor) -> Tensor:
        if self._rows is None:
            return as_rows(x)
        rows = as_rows(x).index_select(0, self._rows)
        return recomputed(rows) if self._again else rows

    def units(self, operand: Tensor, dim: int, of: tuple[int, int] | None) -> Tensor:
        """Gathered once more in backward, which costs less than a copy of every layer's weights."""
        if self.chosen is None:
            return super().units(operand, dim, of)
        return recomputed(operand.index_select(dim, self.chosen if of is None or of[0] == 0 else self.chosen + of[0]))

    def enter(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        hidden = super().enter(x, weight, bias)
        return recomputed(hidden) if self._again else hidden

    def up(self, projection: Projection, u: Tensor) -> Tensor:
        return recomputed(u) if self._again else u


def _chosen(region: FfnRegion, t: Tensors, sample: Tensor | None, units: int, rank: int) -> tuple[Tensor, LeftOut | None]:
    """The `units` hidden units of the largest energy, int64 in ascending order, and a linear map of x for what the others give.

    A unit's energy is the sum over sampled tokens of h_j^2, times the squared norm of column j of the down projection: what leaving it out
    changes in the output, if columns are taken for orthogonal. The map is fitted to what is left out at these tokens.
    """
    x = as_rows(t[region.x]).detach()
    if sample is None:
        sample = ops.sample_tokens(x, None)
    sampled = Ffn(region, t, Units(sample, None), dropout=False)
    hidden = sampled.hidden().detach()
    chosen = ops.choose_units(energy_of(region, t, hidden), units)
    if not rank:
        return chosen, None
    return chosen, ops.fit_linear(x.index_select(0, sample), sampled.down(hidden.index_fill(1, chosen, 0)).detach(), rank)


def energy_of(region: FfnRegion, t: Tensors, hidden: Tensor) -> Tensor:
    """Energies of hidden units from their values at some tokens: fp32 [hidden], from [n, hidden]."""
    columns = _squares(t[region.down.weight], 1 if region.down.transposed else 0)
    return (_squares(hidden, 0) * columns).detach()


def _squares(x: Tensor, dim: int) -> Tensor:
    x = cast(x, torch.float32)
    return (x * x).sum(dim)
