"""The normalised graphs of a model, as a compile would see them, and the values of all their nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx import Node

from sptc.passes.graph.frame import checkpoint_bodies
from sptc.passes.graph.pattern import CHECKPOINT
from sptc.passes.normalize.lower import normalize


class Captured(NamedTuple):
    gm: fx.GraphModule  # normalised
    inputs: list[Any]  # of its placeholders


def capture(model: Callable[..., Any], inputs: Mapping[str, Any], **options: Any) -> list[Captured]:
    """Run `model(**inputs)` under torch.compile and return each captured graph, normalised; what runs is the graph as captured."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(Captured(normalize(gm, example_inputs), list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, **options)(**inputs)
    return found


def node_values(captured: Captured) -> dict[Node, Any]:
    """What each node of the graph computes, those in checkpoint bodies included."""
    values: dict[Node, Any] = {}
    with torch.no_grad():
        _Recorder(captured.gm, values).run(*captured.inputs)
    return values


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, values: dict[Node, Any]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._values = values
        self._bodies = dict(checkpoint_bodies(gm))

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and n.target is CHECKPOINT:
            _, *operands = self.fetch_args_kwargs_from_env(n)[0]
            result = _Recorder(self._bodies[n], self._values).run(*operands)
        else:
            result = super().run_node(n)
        self._values[n] = result
        return result
