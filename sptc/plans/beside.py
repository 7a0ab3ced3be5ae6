"""Sparse forms of regions beside the dense ones in one graph, and an interpreter that takes one or the other: what a region changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from sptc.ir.region import AttentionRegion, Region, Settings
from sptc.passes.decide.key import region_keys
from sptc.passes.graph.frame import Frame, frames
from sptc.passes.graph.pattern import CHECKPOINT
from sptc.passes.rewrite.forms import sparse_form
from sptc.passes.rewrite.token_lists import insert_tokens
from sptc.passes.unit import Unit

_DROPOUT = frozenset({torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default})
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_ATTENTION_DROPOUT = 4  # position of dropout_p


@dataclass(frozen=True)
class Beside:
    """Sparse forms beside the dense ones."""

    owner: Mapping[Node, tuple[str, float]]  # of each inserted node
    forms: Mapping[Node, tuple[str, Mapping[float, Node]]]  # for a region's y: its key, and what stands for y by density


def insert_beside(unit: Unit, candidates: Mapping[Region, Sequence[Settings]]) -> Beside:
    """Insert the sparse form of each region at each of its candidate settings, which nothing uses yet."""
    by_graph: dict[fx.Graph, Frame] = {frame.gm.graph: frame for frame in frames(unit.gm)}
    owner: dict[Node, tuple[str, float]] = {}
    forms: dict[Node, tuple[str, dict[float, Node]]] = {}
    tokens = insert_tokens(unit, [settings for tried in candidates.values() for settings in tried])
    for region, key in region_keys(unit.regions).items():
        state = unit.states.get(region)
        for settings in candidates.get(region, ()):
            before = region.y.prev
            # An untrained state gathers no statistics.
            frozen = replace(state, training=False) if state is not None else None
            forms.setdefault(region.y, (key, {}))[1][settings.density] = sparse_form(
                _without_dropout(region), settings, frozen, by_graph, tokens
            )
            node = before.next
            while node is not region.y:
                owner[node] = key, settings.density
                node = node.next
    return Beside(owner, forms)


def remove(beside: Beside) -> None:
    """Erase the forms that `insert_beside` inserted."""
    for node in reversed(list(beside.owner)):
        node.graph.erase_node(node)


def _without_dropout(region: Region) -> Region:
    if isinstance(region, AttentionRegion):
        return replace(region, dropout_p=0.0)
    lora = region.down.lora
    down = replace(region.down, lora=replace(lora, dropout_p=0.0)) if lora is not None else region.down
    return replace(region, dropout_p=0.0, down=down)


class Mixed(fx.Interpreter):
    """Runs a normalized graph without dropout, checkpoint bodies included, with the sparse forms of the regions in `densities`."""

    def __init__(self, gm: fx.GraphModule, beside: Beside, densities: Mapping[str, float], ends: frozenset[Node] = frozenset()) -> None:
        super().__init__(gm)
        self.seen: dict[Node, Tensor] = {}  # the values of `ends`
        self._ends = ends
        self._beside = beside
        self._densities = densities

    def run_node(self, n: Node) -> Any:
        if n in self._beside.owner:
            key, density = self._beside.owner[n]
            if self._densities.get(key) != density:
                return None  # of a form that is not asked for
        key, forms = self._beside.forms.get(n, ("", {}))
        result = self.env[forms[self._densities[key]]] if key in self._densities else super().run_node(n)
        if n in self._ends:
            self.seen[n] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is CHECKPOINT:
            return Mixed(args[0], self._beside, self._densities).run(*args[1:])
        if target in _DROPOUT:
            return args[0]
        if target is torch._C._set_grad_enabled:
            return None  # the model's own no_grad ends here; ours does not
        if target is _ATTENTION:
            if len(args) > _ATTENTION_DROPOUT:
                args = (*args[:_ATTENTION_DROPOUT], 0.0, *args[_ATTENTION_DROPOUT + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return super().call_function(target, args, kwargs)
