"""Sparse forms of regions beside the dense ones in one graph, and an interpreter that takes one or the other: what a region changes."""

from __future__ import annotations

import itertools
from collections.abc import Container, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _exit_autocast
from torch.fx import Node

from sptc.device.products import linear
from sptc.ir.region import AttentionRegion, Region, Settings
from sptc.passes.decide.planned import region_keys
from sptc.passes.graph.effects import written_by
from sptc.passes.graph.frame import Frame, frames
from sptc.passes.graph.pattern import CHECKPOINT
from sptc.passes.rewrite.forms import sparse_form
from sptc.passes.rewrite.token_lists import insert_tokens
from sptc.passes.unit import Unit

_DROPOUT = frozenset({torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default})
_LINEAR = torch.ops.aten.linear.default
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


def cuts(unit: Unit, beside: Beside) -> dict[str, Node | None]:
    """For each region's key the node of the outermost graph before which nothing of its sparse forms stands.

    None: what ran before can't be shared by several runs, because the graph writes in place.
    """
    shared = not any(written_by(node) for frame in frames(unit.gm) for node in frame.gm.graph.nodes)
    stands_in = {frame.gm.graph: frame for frame in frames(unit.gm)}
    first: dict[Node, set[str]] = {}
    for node, (key, _) in beside.owner.items():
        frame = stands_in[node.graph]
        while frame.parent is not None and frame.call is not None:
            node, frame = frame.call, frame.parent
        first.setdefault(node, set()).add(key)
    found: dict[str, Node | None] = {}
    for node in unit.gm.graph.nodes:
        for key in first.get(node, ()):
            found.setdefault(key, node if shared else None)
    return found


def _without_dropout(region: Region) -> Region:
    if isinstance(region, AttentionRegion):
        return replace(region, dropout_p=0.0)
    lora = region.down.lora
    down = replace(region.down, lora=replace(lora, dropout_p=0.0)) if lora is not None else region.down
    return replace(region, dropout_p=0.0, down=down)


class Mixed(fx.Interpreter):
    """Runs a normalized graph without dropout, checkpoint bodies included, with the sparse forms of the regions in `densities`.

    `until` and `resume` run no further than to the last of `ends`.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        beside: Beside,
        densities: Mapping[str, float],
        ends: frozenset[Node] = frozenset(),
        skipped: Container[Node] = (),  # what neither `ends` nor a region depends on
    ) -> None:
        super().__init__(gm)
        self.seen: dict[Node, Any] = {}  # the values of `ends`
        self._ends, self._skipped = ends, skipped
        self._beside = beside
        self._densities = densities
        self._open: list[torch.autocast] = []  # that another run entered, and
        self._left: list[torch.autocast] = []  # that this one left

    def until(self, cuts: Container[Node], *args: Any) -> Generator[Node]:
        """Run, and stop before each of `cuts`, nodes of the outermost graph, so that others can `resume` there. To be closed."""
        self.args_iter = iter(args)
        try:
            for node in self.graph.nodes:
                if node in cuts:
                    yield node
                self._step(node)
                if len(self.seen) == len(self._ends):
                    return
        finally:
            self._leave()

    def resume(self, start: Node, env: Mapping[Node, Any]) -> None:
        """Run from `start` on.

        Args:
            env: values of what stands before, of another run that was stopped there (`env`).
        """
        self.env = dict(env)
        self._open = _modes(env)
        try:
            for node in itertools.dropwhile(lambda node: node is not start, self.graph.nodes):
                self._step(node)
                if len(self.seen) == len(self._ends):
                    break
        finally:
            self._leave()
            for mode in reversed(self._left):  # the other run is still inside
                mode.__enter__()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As `Interpreter.run`, and wherever it fails, no autocast stays open."""
        try:
            return super().run(*args, **kwargs)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Leave the autocasts that this run entered and has not left: those that it failed in."""
        for mode in reversed(_modes(self.env)):
            if mode not in self._open:
                mode.__exit__(None, None, None)

    def _step(self, node: Node) -> None:
        self.env[node] = self.run_node(node)
        for unused in self.user_to_last_uses.get(node, ()):
            del self.env[unused]

    def run_node(self, n: Node) -> Any:
        if n in self._skipped:
            return None
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
        if target is _exit_autocast and args[0] in self._open:
            self._left.append(args[0])
        if target is _ATTENTION:
            if len(args) > _ATTENTION_DROPOUT:
                args = (*args[:_ATTENTION_DROPOUT], 0.0, *args[_ATTENTION_DROPOUT + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        if target is _LINEAR and not torch.is_grad_enabled() and not torch.is_autocast_enabled(args[0].device.type):
            target = linear
        return super().call_function(target, args, kwargs)


def _modes(env: Mapping[Node, Any]) -> list[torch.autocast]:
    """The autocasts among values that are alive: those that are open."""
    return [value for value in env.values() if isinstance(value, torch.autocast)]
