"""Which tokens FFNs tell apart, as nodes made once for a whole graph: those that count in the loss, and those that no token attends to."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from sptc.ir.region import Counted, FfnSettings, Rows, Settings, UnitSettings
from sptc.passes.find.counted import insert_mask
from sptc.passes.find.padding import averages_padding, padding_mask
from sptc.passes.graph.insert import insert
from sptc.passes.graph.pattern import same_size, shape
from sptc.passes.unit import Unit

ops = torch.ops.sptc


class Tokens(NamedTuple):
    """Tensors where a form is traced, and their nodes in the graph; None: not known, or not asked for. Rows are numbers, int64, of N tokens
    in all."""

    order: Any = None  # the rows that are computed; None: all
    counted: Any = None  # rows of the tokens that count, and of some others that are computed like them, [c]
    context: Any = None  # rows of the others that are computed
    counted_sample: Any = None  # rows that the energies of the former are measured on
    context_sample: Any = None
    sample: Any = None  # of all tokens that are no padding
    among: Any = None  # Tokens, where rows are left out: those that count and the others as places in `counted`, then `context`


@dataclass(frozen=True)
class TokenLists:
    """What all regions of a graph need to know of its tokens."""

    mask: Node | None  # bool [N]: the tokens that count
    by_rows: Mapping[Rows, Tokens]
    padded: tuple[Any, ...] = ()  # sizes of the input that tells padding: of which tokens `sample` is


def insert_tokens(unit: Unit, settings: Iterable[Settings]) -> TokenLists:
    """Insert what the regions with these settings need to know, after the inputs of the outermost graph."""
    every = list(settings)
    by_units = [s for s in every if isinstance(s, UnitSettings) and not s.whole]
    kinds = {s.rows for s in by_units}
    padding = padding_mask(unit) if by_units else None
    # Rows that are read hold the tokens that count, if these are told apart at all.
    known = isinstance(unit.counted, Counted) and (padding is None or same_size(math.prod(unit.counted.lead), math.prod(shape(padding))))
    split = any(s.context is not None for s in by_units) or "counted" in kinds or ("visible" in kinds and known)
    mask = None
    if split or any(isinstance(s, FfnSettings) and s.keep for s in every):
        assert isinstance(unit.counted, Counted)
        mask = insert_mask(unit.gm, unit.counted)
    like = mask if mask is not None else padding
    if like is None:
        return TokenLists(None, {"all": Tokens()})
    anchor = mask.next if mask is not None else next(node for node in unit.gm.graph.nodes if node.op != "placeholder")
    averaged = padding is not None and averages_padding(unit)
    lists = partial(_lists, kinds=kinds, known=known, averaged=averaged)
    return TokenLists(mask, insert(anchor, lists, mask if split else None, padding, like=like), shape(padding))


def _lists(mask: Tensor | None, padding: Tensor | None, kinds: Collection[Rows], known: bool, averaged: bool) -> dict[Rows, Tokens]:
    """The lists for each kind of rows.

    Args:
        mask: bool [N], the tokens that count; None: they are not told apart.
        padding: [batch, tokens], 0 at padding; None: there is none.
        kinds: of rows that are asked for beside "all".
        known: the tokens of both are the same.
        averaged: queries that see nothing average over all keys, hidden ones included.
    """
    every, read, visible = Tokens(), None, None
    made: dict[Rows, Tokens] = {}
    if padding is not None:
        real = padding != 0
        visible, first = real.reshape(-1), real[:, :1]
        every = Tokens(sample=ops.sample_tokens(visible, visible))
        if "visible" in kinds:
            # Queries may see nothing where the first token is padding, and average over the sequence. Else it is read by classifiers.
            read = torch.logical_or(real, first.logical_not()) if averaged else torch.cat([torch.ones_like(first), real[:, 1:]], 1)
            read = read.reshape(-1)
    if mask is not None:
        others = mask.logical_not()
        shown = others
        if visible is not None and same_size(visible.shape[0], mask.shape[0]):
            shown = torch.logical_and(others, visible)
        dense = ops.in_steps(ops.in_steps(mask, shown), others)
        counted, context = ops.split_tokens(dense)
        first, second = (ops.sample_tokens(mask, of) for of in (mask, shown))
        every = Tokens(None, counted, context, first, second, every.sample)
        if read is not None and known:
            made["visible"] = _visible(every, dense, torch.logical_and(dense.logical_not(), read), mask, shown)
        if "counted" in kinds:
            made["counted"] = Tokens(order=counted, sample=every.counted_sample)
    if read is not None and "visible" not in made:
        made["visible"] = every._replace(order=ops.rows_where(ops.in_steps(read, read.logical_not())))
    return {"all": every, **made}


def _visible(every: Tokens, dense: Tensor, others: Tensor, mask: Tensor, shown: Tensor) -> Tokens:
    """Those that are computed as tokens that count, `dense`, and the others that are read, with as many more as make few numbers of rows.

    Energies are measured on those that do count, `mask`, and those of the others that are no padding, `shown`.
    """
    others = ops.in_steps(others, dense.logical_not())
    counted, context = every.counted, ops.rows_where(others)
    # Sizes are data: places are counted up, since an arange would have sizes of its own. And all of them together have a size of their own,
    # not the sum of two, of which a graph for backward that is given nothing else could not tell the parts.
    order = ops.rows_where(torch.logical_or(dense, others))
    first, second = torch.ones_like(counted).cumsum(0) - 1, torch.ones_like(context).cumsum(0) - 1 + counted.shape[0]
    rows = torch.cat([counted, context])
    samples = (ops.sample_tokens(rows, of.index_select(0, rows)) for of in (mask, shown))
    return every._replace(order=order, context=context, among=Tokens(None, first, second, *samples))
