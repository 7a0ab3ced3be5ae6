"""Rewrite the regions that were decided on into sparse operators. The operators are named, not imported: their owner registers them."""

from __future__ import annotations

from dataclasses import replace

from sptc.passes.normalize import graphs
from sptc.passes.rewrite_attention import rewrite_attention
from sptc.passes.rewrite_ffn import rewrite_ffn
from sptc.passes.unit import Unit
from sptc.region import AttentionSettings, CodebookState, Decision, FfnSettings, RouterState


def rewrite(unit: Unit) -> Unit:
    """Replace each decided region by its sparse operators and drop what nothing uses any more, such as an n x n mask."""
    chosen = [d for d in unit.decisions if d.rewrite]
    for decision in chosen:
        _rewrite(decision, unit)
    for decision in chosen:
        _erase(decision)
    for gm in graphs(unit.gm):
        gm.graph.eliminate_dead_code()
    return replace(unit)


def _rewrite(decision: Decision, unit: Unit) -> None:
    region, state = decision.region, unit.states.get(decision.region)
    if region.kind == "ffn":
        assert isinstance(decision.settings, FfnSettings) and (state is None or isinstance(state, RouterState))
        y = rewrite_ffn(region, decision.settings, state)
    else:
        assert isinstance(decision.settings, AttentionSettings) and (state is None or isinstance(state, CodebookState))
        y = rewrite_attention(region, decision.settings, state)
    region.y.replace_all_uses_with(y)


def _erase(decision: Decision) -> None:
    """Remove the dense nodes; dead code elimination alone would keep dropout, which draws random numbers."""
    region = decision.region
    for node in reversed(region.y.graph.nodes):
        if node in region.nodes and not node.users:
            region.y.graph.erase_node(node)
