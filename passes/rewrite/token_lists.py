"""Which tokens FFNs tell apart, as nodes made once for a whole graph: those that count in the loss, and those that no token attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.fx import Node

from sptc.ir.predicate import Binary, Element, Index, Literal, parse
from sptc.ir.region import AttentionRegion, Counted, FfnSettings, Settings, UnitSettings
from sptc.passes.find.counted import insert_mask
from sptc.passes.graph.build import Builder, aten
from sptc.passes.graph.frame import frames, outermost
from sptc.passes.graph.pattern import same_size, shape
from sptc.passes.unit import Unit

ops = torch.ops.sptc


@dataclass(frozen=True)
class Tokens:
    """Nodes of one graph; None: not known, or not asked for. Rows are int64, N tokens in all."""

    mask: Node | None = None  # bool [N]: the tokens that count
    counted: Node | None = None  # rows of the tokens that count, [c]
    context: Node | None = None  # rows of the others, [N - c]
    counted_sample: Node | None = None  # rows that the energies of the former are measured on
    context_sample: Node | None = None
    sample: Node | None = None  # of all tokens that are no padding
    padded: tuple[Any, ...] = ()  # sizes of the input that tells padding

    def through(self, move: Callable[[Node], Node]) -> Tokens:
        """The same as nodes of another graph."""
        moved = {f.name: move(node) for f in fields(self) if isinstance(node := getattr(self, f.name), Node)}
        return replace(self, **moved)


def insert_tokens(unit: Unit, settings: Iterable[Settings]) -> Tokens:
    """Insert what the regions with these settings need to know, after the inputs of the outermost graph."""
    every = list(settings)
    by_units = [s for s in every if isinstance(s, UnitSettings) and not s.whole]
    split = any(s.context is not None for s in by_units)
    padding = padding_mask(unit) if by_units else None
    mask = None
    if split or any(isinstance(s, FfnSettings) and s.keep for s in every):
        assert isinstance(unit.counted, Counted)
        mask = insert_mask(unit.gm, unit.counted)
    anchor = mask.next if mask is not None else next(node for node in unit.gm.graph.nodes if node.op != "placeholder")
    like = mask if mask is not None else padding
    if like is None:
        return Tokens()
    b = Builder(anchor, like)
    tokens = Tokens(mask)
    visible = None if padding is None else b.call(aten.reshape.default, b.call(aten.ne.Scalar, padding, 0), [-1])
    if visible is not None:
        tokens = replace(tokens, sample=b.call(ops.sample_tokens.default, visible, visible), padded=shape(padding))
    if mask is None or not split:
        return tokens
    lists = b.call(ops.split_tokens.default, mask)
    context = b.call(aten.logical_not.default, mask)
    if visible is not None and same_size(shape(visible)[0], shape(mask)[0]):
        context = b.call(aten.logical_and.default, context, visible)
    samples = (b.call(ops.sample_tokens.default, mask, of) for of in (mask, context))
    names = ("counted", "context", "counted_sample", "context_sample")
    return replace(tokens, **dict(zip(names, (b.item(lists, 0), b.item(lists, 1), *samples), strict=True)))


def padding_mask(unit: Unit) -> Node | None:
    """The input [batch, tokens] that is 0 at padding: the one by which attention hides keys whatever looks at them."""
    by_graph = {frame.gm.graph: frame for frame in frames(unit.gm)}
    for region in unit.regions:
        if not isinstance(region, AttentionRegion):
            continue
        for conjunct in parse(region.mask.predicate).conjuncts:
            tree = conjunct.tree
            if isinstance(tree, Binary) and tree.operator == "!=" and tree.right == Literal(0):
                tree = tree.left
            if isinstance(tree, Element) and tree.indices == (Index("b"), Index("k")):
                node = region.mask.tensors[tree.position]
                node = outermost(node, by_graph[node.graph])
                if node.graph is unit.gm.graph and node.op == "placeholder" and len(shape(node)) == 2:
                    return node
    return None
