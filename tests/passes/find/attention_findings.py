"""Findings of attention in captured graphs, with the values of their nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from sptc.ir.region import AttentionRegion, Found
from sptc.passes.find.attention import find_attention
from sptc.passes.graph.boundary import breach
from sptc.passes.graph.frame import checkpoint_bodies
from tests.capture import Captured, node_values
from tests.passes.attention_semantics import compute


def check(region: AttentionRegion, values) -> None:
    """The region computes its y, and is closed."""
    expected, seen = compute(region, values)
    actual = values[region.y].double()
    torch.testing.assert_close(actual[seen], expected[seen], rtol=1e-5, atol=1e-6)
    assert seen.any() and breach(region.nodes, region.y) is None
    assert region.y in region.nodes and region.nodes.isdisjoint({region.q, region.k, region.v})


def found_in(captured: list[Captured], outer: bool = True) -> list[tuple[Found, dict]]:
    """Findings and node values of every graph, checkpoint bodies after the graph around them."""
    result = []
    for one in captured:
        values = node_values(one)
        result.append((find_attention(one.gm), values))
        for call, body in checkpoint_bodies(one.gm):
            placeholders = body.graph.find_nodes(op="placeholder")
            around = dict(zip(placeholders, call.args[1:], strict=True))
            result.append((find_attention(body, around if outer else None), values))
    return result


def qkv(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(2, 4, 13, 8, requires_grad=True) for name in "qkv"}
