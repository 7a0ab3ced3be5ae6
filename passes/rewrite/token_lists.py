"""Which tokens FFNs tell apart, as nodes made once for a whole graph: those that count in the loss, and those that no token attends to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.fx import Node

from sptc.ir.region import Counted, FfnSettings, Rows, Settings, UnitSettings
from sptc.passes.find.counted import insert_mask
from sptc.passes.find.padding import averages_padding, padding_mask
from sptc.passes.graph.build import Builder, aten
from sptc.passes.graph.pattern import same_size, shape
from sptc.passes.unit import Unit

ops = torch.ops.sptc


@dataclass(frozen=True)
class Tokens:
    """Nodes of one graph; None: not known, or not asked for. Rows are numbers, int64, of N tokens in all."""

    order: Node | None = None  # the rows that are computed; None: all
    counted: Node | None = None  # rows of the tokens that count, [c]
    context: Node | None = None  # rows of the others that are computed
    counted_sample: Node | None = None  # rows that the energies of the former are measured on
    context_sample: Node | None = None
    sample: Node | None = None  # of all tokens that are no padding
    padded: tuple[Any, ...] = ()  # sizes of the input that tells padding
    among: Tokens | None = None  # where rows are left out: those that count and the others as places in `counted`, then `context`

    def through(self, move: Callable[[Node], Node]) -> Tokens:
        """The same as nodes of another graph."""
        moved = {f.name: move(node) for f in fields(self) if isinstance(node := getattr(self, f.name), Node)}
        return replace(self, **moved, among=None if self.among is None else self.among.through(move))


@dataclass(frozen=True)
class TokenLists:
    """What all regions of a graph need to know of its tokens."""

    mask: Node | None  # bool [N]: the tokens that count
    by_rows: Mapping[Rows, Tokens]


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
    anchor = mask.next if mask is not None else next(node for node in unit.gm.graph.nodes if node.op != "placeholder")
    like = mask if mask is not None else padding
    if like is None:
        return TokenLists(None, {"all": Tokens()})
    b = Builder(anchor, like)
    every_token = Tokens()
    read = visible = None
    if padding is not None:
        real = b.call(aten.ne.Scalar, padding, 0)
        visible = b.call(aten.reshape.default, real, [-1])
        every_token = Tokens(sample=b.call(ops.sample_tokens.default, visible, visible), padded=shape(padding))
        if "visible" in kinds:
            read = b.call(aten.reshape.default, _and_all_unseen(b, real) if averages_padding(unit) else _and_first(b, real), [-1])
    made: dict[Rows, Tokens] = {}
    if mask is not None and split:
        lists = b.call(ops.split_tokens.default, mask)
        others = b.call(aten.logical_not.default, mask)
        hidden = visible is not None and same_size(shape(visible)[0], shape(mask)[0])
        context = b.call(aten.logical_and.default, others, visible) if hidden else others
        samples = (b.call(ops.sample_tokens.default, mask, of) for of in (mask, context))
        names = ("counted", "context", "counted_sample", "context_sample")
        every_token = replace(every_token, **dict(zip(names, (b.item(lists, 0), b.item(lists, 1), *samples), strict=True)))
        if read is not None and known:
            made["visible"] = _visible(b, every_token, mask, b.call(aten.logical_and.default, others, read))
        if "counted" in kinds:
            made["counted"] = Tokens(order=every_token.counted, sample=every_token.counted_sample)
    if read is not None and "visible" not in made:
        made["visible"] = replace(every_token, order=b.call(ops.rows_where.default, read))
    return TokenLists(mask, {"all": every_token, **made})


def _and_first(b: Builder, real: Node) -> Node:
    """A mask [batch, tokens] that holds the first token of each sequence as well: classifiers read it, wherever padding is."""
    first = b.call(aten.slice.Tensor, real, 1, 0, 1)
    rest = b.call(aten.slice.Tensor, real, 1, 1)
    return b.call(aten.cat.default, [b.call(aten.ones_like.default, first), rest], 1)


def _and_all_unseen(b: Builder, real: Node) -> Node:
    """A mask [batch, tokens] that holds all of a sequence whose first token is padding: queries may see nothing there, and average all."""
    return b.call(aten.logical_or.default, real, b.call(aten.logical_not.default, b.call(aten.slice.Tensor, real, 1, 0, 1)))


def _visible(b: Builder, every: Tokens, mask: Node, others: Node) -> Tokens:
    """Those that count, by `mask`, and the others that are read."""
    assert every.counted is not None
    counted, context = every.counted, b.call(ops.rows_where.default, others)
    # Sizes are data: places are counted up, since an arange would have sizes of its own. And all of them together have a size of their own,
    # not the sum of two, of which a graph for backward that is given nothing else could not tell the parts.
    order = b.call(ops.rows_where.default, b.call(aten.logical_or.default, mask, others))
    ones, rest = b.call(aten.ones_like.default, counted), b.call(aten.ones_like.default, context)
    place = b.call(aten.sub.Tensor, b.call(aten.cumsum.default, b.call(aten.cat.default, [ones, rest]), 0), 1)
    first = b.call(aten.sub.Tensor, b.call(aten.cumsum.default, ones, 0), 1)
    second = b.call(aten.add.Tensor, b.call(aten.sub.Tensor, b.call(aten.cumsum.default, rest, 0), 1), b.size(counted, 0))
    counts = b.call(aten.lt.Scalar, place, b.size(counted, 0))
    samples = (b.call(ops.sample_tokens.default, counts, of) for of in (counts, b.call(aten.logical_not.default, counts)))
    return replace(every, order=order, context=context, among=Tokens(None, first, second, *samples))
