"""The normalised graphs of a model, as a compile would see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from sptc.passes.normalize import normalize


def capture(model: nn.Module, inputs: Mapping[str, Any]) -> list[fx.GraphModule]:
    """Run `model(**inputs)` under torch.compile and return each captured graph, normalised; what runs is the graph as captured."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(normalize(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(**inputs)
    return graphs
