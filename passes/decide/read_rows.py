"""Which tokens' rows of an FFN's output anything reads: those that no one does need no FFN, and nothing but them changes.

Values are followed backwards from what the graph is for. A loss reads the tokens whose label counts; attention reads, of keys and values,
those that its mask does not hide as padding; a product with the mask, as in a mean over tokens, reads these as well, and a classifier the
first of each sequence; what treats every token alike reads the rows that are read of it; everything else reads all. So in a batch that is
padded, FFNs are for the tokens that are no padding, and after the last attention for those that count alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import IntEnum

from torch.fx import Node

from sptc.ir.region import AttentionRegion, Counted, FfnRegion, LossRegion, Region, Rows
from sptc.passes.find.counted import fits
from sptc.passes.find.padding import OF_PAIRS, averages, first_is_seen, hiding, in_its_order, padding_mask
from sptc.passes.find.returned import ends_at_a_break
from sptc.passes.graph.effects import written_values
from sptc.passes.graph.frame import Frame, operands
from sptc.passes.graph.pattern import COPIES, TRANSPARENT, VIEWS, base_name, dtype, op, same_size, shape
from sptc.passes.graph.poles import may_be_infinite
from sptc.passes.graph.row_axes import Axes, Follower, axes_after, empty, rows_of
from sptc.passes.unit import Unit


class _Read(IntEnum):
    """Each includes those before it."""

    NONE = 0
    COUNTED = 1
    VISIBLE = 2  # those that are no padding, those that count, and the first of each sequence
    ALL = 3


_NAMES: Mapping[_Read, Rows] = {_Read.COUNTED: "counted", _Read.VISIBLE: "visible", _Read.ALL: "all", _Read.NONE: "all"}


def read_rows(unit: Unit, rewritten: Collection[Region | LossRegion]) -> dict[Region, Rows]:
    """For each FFN whose tokens are those of the padding mask, or of the labels, the rows of its output that are read.

    Logits that the graph returns beside its loss, and caches of keys and values there, are taken to be read where no padding is.

    `rewritten`: the losses that are computed without logits, whose logits the graph does not return any more.
    """
    counted, padding = unit.counted if isinstance(unit.counted, Counted) else None, padding_mask(unit)
    if padding is None and counted is None:
        return {}
    reader = _Reader(unit, counted, padding, rewritten)
    reader.follow(reader.frames[0])
    reader.read(reader.frames[0])
    known = {region: reader.needs[region.y] for region in unit.regions if isinstance(region, FfnRegion) and region.y in reader.needs}
    ordered = frozenset() if padding is None else in_its_order(unit, padding)
    return {region: _NAMES[_Read.ALL if need is _Read.VISIBLE and region not in ordered else need] for region, need in known.items()}


class _Reader(Follower):
    """Follows rows forwards, then reads backwards, through checkpoint bodies as through the graph around them.

    Attributes:
        axes: without an entry a value does not depend on FFNs; None where tokens are mixed.
        needs: what is read of a value.
    """

    def __init__(self, unit: Unit, counted: Counted | None, padding: Node | None, rewritten: Collection[Region | LossRegion]) -> None:
        super().__init__(unit.gm, (*unit.losses, *unit.regions))
        self.needs: dict[Node, _Read] = {}
        self._padding = padding
        self._written = {node for frame in self.frames for node in written_values(frame.gm.graph)}
        self._lead = shape(padding) if counted is None or padding is not None else counted.lead
        same = counted is not None and same_size(math.prod(counted.lead), math.prod(self._lead))
        self._counted = counted if same else None  # if labels are of these tokens
        self._rewritten = rewritten
        attentions = [r for r in unit.regions if isinstance(r, AttentionRegion)]
        self._keys = {r: frozenset(n for operand in (r.k, r.v) for n in _with_cache(operand)) for r in attentions}
        # Behind a graph break anything reads what the graph returns; a graph without labels may end at one.
        self._broken = counted is None or ends_at_a_break(unit.gm)
        self._cached = set() if self._broken else set().union(*self._keys.values())
        hides = [r for r in attentions if padding is not None and hiding(r, self._by_graph) is padding]
        self._padded = {n for r in hides for n in self._stream(r.k)}  # what keys are computed from, token by token

    def _follow_call(self, node: Node) -> None:
        if not any(n in self.axes or n in self._by_call for n in node.all_input_nodes):
            return
        known = {n: rows for n in node.all_input_nodes if (rows := self.axes.get(n)) is not None}
        # Rows that are left out are zeros: what would make NaN of them reads all, since a product with 0 leaves NaN as it is.
        self.axes[node] = axes_after(node, known) if known and not may_be_infinite(node, known, self._written) else None

    def _follow_region(self, region: Region) -> None:
        if isinstance(region, FfnRegion):
            lead = shape(region.y)[:-1]
            if fits(self._lead, region):
                self.axes[region.y] = rows_of(lead, range(len(lead)))
            elif region.x in self.axes:
                self.axes[region.y] = None
        elif isinstance(region, AttentionRegion) and any(n in self.axes for n in (region.q, region.k, region.v)):
            self.axes[region.y] = rows_of(shape(region.y), (0, 2)) if self._lies(region.q) else None

    def _lies(self, operand: Node) -> bool:
        """Whether the tokens of an operand of attention, if it depends on them, are its batch and length."""
        sizes = shape(operand)
        return len(sizes) == 4 and self.axes.get(operand, rows_of(sizes, (0, 2))) == rows_of(sizes, (0, 2))

    def _in_order(self, node: Node, axis: int = -1) -> bool:
        """Whether a value's tokens are all of its dimensions but `axis`, in their order: lists of tokens, and labels, are of those."""
        sizes = shape(node)
        return self.axes.get(node) == rows_of(sizes, [dim for dim in range(len(sizes)) if dim != axis % len(sizes)])

    def _labels_lie(self) -> bool:
        """Whether labels are of the tokens that lists are of, in their order."""
        return self._counted is not None and self._in_order(self._counted.rows_of, self._counted.axis)

    def read(self, frame: Frame) -> None:
        """Find what is read of every value that follows from an FFN, last first."""
        for node in reversed(frame.gm.graph.nodes):
            if node in self._by_call:
                self.read(self._by_call[node])
            region = self._inside.get(node)
            if node in self.axes and (region is None or node is region.y):
                self.needs[node] = max((self._by(user, node, frame) for user in node.users), default=_Read.NONE)

    def _by(self, user: Node, node: Node, frame: Frame) -> _Read:
        """What a user reads of a node."""
        if user.op == "output":
            return self._by_output(node, frame)
        region = self._inside.get(user)
        if region is not None:
            return self._by_region(region, node)
        if user in self._by_call:
            inner = [placeholder for placeholder, outer in operands(self._by_call[user]).items() if outer is node]
            return max((self.needs.get(placeholder, _Read.NONE) for placeholder in inner), default=_Read.ALL)
        rows = self.axes[node]
        if op(user) in COPIES and node is not user.args[0]:
            return _Read.NONE  # but its dtype
        if rows is None:
            return _Read.ALL
        if self._padding is not None and (self._takes_first(user, rows) or self._masks(user, node, rows)):
            return min(_Read.VISIBLE, self.needs.get(user, _Read.VISIBLE))
        return _Read.ALL if self.axes.get(user) is None else self.needs[user]

    def _takes_first(self, user: Node, rows: Axes) -> bool:
        """Whether a node is the first token of each sequence, and not of other parts of the batch, in which a view sees its tokens."""
        if op(user) != "aten.select.int" or len(rows) != len(self._lead) or tuple(user.args[1:]) != (rows[-1], 0):
            return False
        sizes = shape(user.args[0])  # type: ignore[arg-type]
        return all(same_size(sizes[dim], size) for dim, size in zip(rows, self._lead, strict=True))

    def _masks(self, user: Node, node: Node, rows: Axes) -> bool:
        """Whether a node is a product with the padding mask, token by token: 0 at padding whatever stands there."""
        if op(user) != "aten.mul.Tensor":
            return False
        for factor in user.args:
            mask = self._rows_of_mask(factor) if isinstance(factor, Node) and factor is not node else None
            if mask is not None and tuple(dim - len(shape(factor)) for dim in mask) == tuple(dim - len(shape(node)) for dim in rows):
                return True
        return False

    def _rows_of_mask(self, node: Node) -> Axes | None:
        """The rows of what is the padding mask in another shape or dtype; None for anything else."""
        if node in self._written:
            return None
        if node is self._padding:
            return rows_of(shape(node), range(len(shape(node))))
        if not (op(node) in TRANSPARENT or op(node) in VIEWS or op(node) == "aten.expand.default"):
            return None
        rows = self._rows_of_mask(node.args[0])  # type: ignore[arg-type]
        return None if rows is None else axes_after(node, {node.args[0]: rows})  # type: ignore[dict-item]

    def _by_output(self, node: Node, frame: Frame) -> _Read:
        if frame.call is None:
            return self._beside(node) if not self._cached.isdisjoint((node, self._result_of(node))) else _Read.ALL
        places = [i for i, returned in enumerate(self._returned(frame)) if returned is node]
        outside = [user for user in frame.call.users if user.target is operator.getitem and user.args[1] in places]
        return max((self.needs.get(user, _Read.ALL) for user in outside), default=_Read.NONE)

    def _by_region(self, region: Region | LossRegion, node: Node) -> _Read:
        if self.axes[node] is None or (isinstance(region, LossRegion) and not self._labels_lie()):
            return _Read.ALL
        if isinstance(region, FfnRegion):
            entering = {region.x, *(up.lora.low for up in region.ups if up.lora is not None)}
            return self.needs.get(region.y, _Read.ALL) if node in entering and self._in_order(node) else _Read.ALL
        if isinstance(region, LossRegion):
            lora = region.projection.lora
            if region.readers or (node is not region.projection.x and (lora is None or node is not lora.low)):
                return _Read.ALL
            return self._beside(node) if region.returned and region not in self._rewritten else _Read.COUNTED
        found = [self.needs.get(region.y, _Read.ALL)] if node is region.q else []
        if node in self._keys[region]:
            hides = self._padding is not None and hiding(region, self._by_graph) is self._padding
            hides = hides and (first_is_seen(region) or not averages(region))
            found.append(_Read.VISIBLE if hides and self._lies(node) else _Read.ALL)
        return max(found, default=_Read.ALL)

    def _beside(self, node: Node) -> _Read:
        """What is read of what the graph returns beside its loss: all of a decoder as long as its encoder, whose padding it is."""
        return _Read.ALL if self._broken or self._padded.isdisjoint(self._stream(node)) else _Read.VISIBLE

    def _stream(self, node: Node) -> Iterator[Node]:
        """The values with as many tokens that a value is computed from, itself included; of attention, what its queries are."""
        seen, waiting = {node}, [node]
        while waiting:
            here = waiting.pop()
            lead = shape(here)[:-1]
            if lead and same_size(math.prod(lead), math.prod(self._lead)):
                yield here
            fresh = [n for n in self._before(here) if n not in seen and (kind := dtype(n)) is not None and kind.is_floating_point]
            seen.update(fresh)
            waiting += fresh

    def _before(self, node: Node) -> Iterable[Node]:
        region, source = self._inside.get(node), node.args[0] if node.args else None
        if isinstance(region, AttentionRegion):
            return [region.q]
        if node.op == "placeholder":
            around = self._by_graph[node.graph]
            return [outer for inner, outer in operands(around).items() if inner is node]
        if (result := self._result_of(node)) is not None:
            return [result]
        if node.target is operator.getitem and isinstance(source, Node):
            return source.all_input_nodes  # of a split
        return node.all_input_nodes[:1] if base_name(node) in OF_PAIRS else node.all_input_nodes


def _with_cache(operand: Node) -> Iterator[Node]:
    """Keys or values, and what they are beside the empty tensors of a cache before its first token."""
    yield operand
    for user in operand.users:
        if op(user) == "aten.cat.default" and all(part is operand or empty(part) for part in user.args[0]):  # type: ignore[union-attr]
            yield user
