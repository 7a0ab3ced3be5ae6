"""Which tokens FFNs tell apart, as nodes made once for a whole graph: those that count in the loss, and those that no token attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.fx import Node

from sptc.ir.region import Counted, FfnSettings, Rows, Settings, UnitSettings
from sptc.passes.find.counted import insert_mask
from sptc.passes.find.padding import padding_mask
from sptc.passes.graph.build import Builder, aten
from sptc.passes.graph.pattern import same_size, shape
from sptc.passes.unit import Unit

ops = torch.ops.sptc


@dataclass(frozen=True)
class Tokens:
    """Nodes of one graph; None: not known, or not asked for. Rows are numbers, int64, of N tokens in all."""

    order: Node | None = None  # the rows that are computed, those that count first; None: all, as they are
    counted: Node | None = None  # rows of the tokens that count, [c]
    context: Node | None = None  # rows of the others that are computed
    counted_sample: Node | None = None  # rows that the energies of the former are measured on
    context_sample: Node | None = None
    sample: Node | None = None  # of all tokens that are no padding
    padded: tuple[Any, ...] = ()  # sizes of the input that tells padding
    among: Tokens | None = None  # the same rows as places in `order`

    @property
    def computed(self) -> Tokens:
        """The rows as places among those that are computed."""
        return self.among or self

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
    split = any(s.context is not None for s in by_units) or bool(kinds - {"all"})
    padding = padding_mask(unit) if by_units else None
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
    visible = None if padding is None else b.call(aten.reshape.default, b.call(aten.ne.Scalar, padding, 0), [-1])
    if visible is not None:
        every_token = Tokens(sample=b.call(ops.sample_tokens.default, visible, visible), padded=shape(padding))
    if mask is None or not split:
        return TokenLists(mask, {"all": every_token})
    lists = b.call(ops.split_tokens.default, mask)
    context = b.call(aten.logical_not.default, mask)
    if visible is not None and same_size(shape(visible)[0], shape(mask)[0]):
        context = b.call(aten.logical_and.default, context, visible)
    samples = (b.call(ops.sample_tokens.default, mask, of) for of in (mask, context))
    names = ("counted", "context", "counted_sample", "context_sample")
    every_token = replace(every_token, **dict(zip(names, (b.item(lists, 0), b.item(lists, 1), *samples), strict=True)))
    made: dict[Rows, Tokens] = {"all": every_token}
    assert every_token.counted is not None
    if "visible" in kinds:
        made["visible"] = _visible(b, every_token, b.call(ops.rows_where.default, context))
    if "counted" in kinds:
        counted = every_token.counted
        made["counted"] = Tokens(order=counted, counted=counted, sample=every_token.counted_sample, among=Tokens())
    return TokenLists(mask, made)


def _visible(b: Builder, every: Tokens, context: Node) -> Tokens:
    """Those that are no padding, or count."""
    assert every.counted is not None
    counted = every.counted
    ones, others = b.call(aten.ones_like.default, counted), b.call(aten.ones_like.default, context)
    # Sizes are data: places are counted up, since an arange would have sizes of its own.
    place = b.call(aten.sub.Tensor, b.call(aten.cumsum.default, b.call(aten.cat.default, [ones, others]), 0), 1)
    first = b.call(aten.sub.Tensor, b.call(aten.cumsum.default, ones, 0), 1)
    rest = b.call(aten.add.Tensor, b.call(aten.sub.Tensor, b.call(aten.cumsum.default, others, 0), 1), b.size(counted, 0))
    counts = b.call(aten.lt.Scalar, place, b.size(counted, 0))
    samples = (b.call(ops.sample_tokens.default, counts, of) for of in (counts, b.call(aten.logical_not.default, counts)))
    among = Tokens(None, first, rest, *samples)
    return replace(every, order=b.call(aten.cat.default, [counted, context]), context=context, among=among)
