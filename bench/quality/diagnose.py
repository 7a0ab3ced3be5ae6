"""What sparsity does to each region of a model on one batch: each gets the dense model's inputs, so that errors do not add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from bench.quality.tasks import Inputs
from sptc.backend import captured_unit
from sptc.codegen.reference.attention import Mask, listed, sparse_attention
from sptc.codegen.reference.block_lists import lists_from_scores, nearest_first, owned
from sptc.config import Config
from sptc.ir import expression
from sptc.ir.region import AttentionRegion, AttentionSettings, Decision, FfnSettings, LossRegion
from sptc.model.capture import capture
from sptc.passes import ANALYSIS
from sptc.passes.graph.frame import frames
from sptc.passes.rewrite.forms import sparse_form
from sptc.passes.rewrite.token_lists import TokenLists, insert_tokens
from sptc.passes.runner import run
from sptc.passes.unit import Unit


@dataclass(frozen=True)
class AttentionMeasure:
    """Attention mass: the share of the dense softmax on the keys kept, mean over queries and heads. Errors are relative, in the L2 norm."""

    module: str
    error: float
    mass: float
    best_error: float  # with the blocks that hold the most mass, as many and the own ones kept
    best_mass: float
    nearest_mass: float  # with the nearest blocks, as many
    keys_mass: float  # with the best keys of each query, as many as the density says
    kind: str = "attention"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FfnMeasure:
    """`shares`: of each block, the share of tokens that use it; their mean is the density. None where no blocks are routed."""

    module: str
    error: float
    shares: tuple[float, ...]
    kind: str = "ffn"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Measure = AttentionMeasure | FfnMeasure


def diagnose(model: nn.Module, batch: Inputs, options: dict[str, Any]) -> list[Measure]:
    """Measure every region that `options` rewrites, in the order of the model; a prepared model with its routers and codebooks.

    The model is run in eval mode and left in the mode it was in.
    """
    config = Config.from_options(options)
    found: list[Measure] = []

    def on_graph(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        unit = run(captured_unit(gm, inputs, config), ANALYSIS)

        def call(*args: Any) -> Any:
            with torch.no_grad():
                found.extend(_measure(unit, args))
                return gm(*args)

        return call

    training = model.training
    model.eval()
    try:
        capture(model, batch, on_graph)  # as for training: a graph without gradients stays dense
    finally:
        model.train(training)
    return found


def _measure(unit: Unit, args: Sequence[Any]) -> list[Measure]:
    """Each region's sparse form is put beside the dense one, which the rest of the graph goes on with."""
    chosen_regions = [d for d in unit.decisions if d.rewrite and not isinstance(d.region, LossRegion)]  # a loss is exact
    tokens = insert_tokens(unit, [decision.settings for decision in chosen_regions])
    beside = [(decision, *_insert(decision, unit, tokens)) for decision in chosen_regions]
    watched = {node for decision, sparse, chosen in beside for node in (*_operands(decision), sparse, chosen) if node is not None}
    values: dict[Node, Any] = {}
    _Watching(unit.gm, watched, values).run(*args)
    return [
        (_attention if isinstance(decision.region, AttentionRegion) else _ffn)(decision, values, values[sparse], values.get(chosen))
        for decision, sparse, chosen in beside
    ]


def _insert(decision: Decision, unit: Unit, tokens: TokenLists) -> tuple[Node, Node | None]:
    """Insert a region's sparse form; returns its output and the node of its choice (select_blocks or route), if it chooses blocks."""
    region, by_graph = decision.region, {frame.gm.graph: frame for frame in frames(unit.gm)}
    before = set(region.y.graph.nodes)
    y = sparse_form(region, decision.settings, unit.states.get(region), by_graph, tokens)
    choosers = (torch.ops.sptc.select_blocks.default, torch.ops.sptc.route.default)
    return y, next((node for node in region.y.graph.nodes if node not in before and node.target in choosers), None)


def _operands(decision: Decision) -> list[Node]:
    region = decision.region
    if not isinstance(region, AttentionRegion):
        return [region.y]
    mask = region.mask
    nodes = (region.y, region.q, region.k, region.v, *mask.tensors, *mask.sizes, mask.boolean, mask.bias, region.sink)
    return [node for node in nodes if isinstance(node, Node)]


def _attention(decision: Decision, values: dict[Node, Any], sparse: Tensor, chosen: Sequence[Tensor]) -> AttentionMeasure:
    region, settings = decision.region, decision.settings
    assert isinstance(region, AttentionRegion) and isinstance(settings, AttentionSettings)
    q, k, v, dense = (values[node] for node in (region.q, region.k, region.v, region.y))
    (b, h, n, _), (h_kv, m), group = q.shape, k.shape[1:3], q.shape[1] // k.shape[1]
    tile, block = settings.query_block, settings.key_block
    operands = region.mask
    mask = Mask(
        operands.predicate,
        [values[node] for node in operands.tensors],
        [values[size] if isinstance(size, Node) else size for size in operands.sizes],
        None if operands.boolean is None else values[operands.boolean],
        None if operands.bias is None else values[operands.bias],
    )
    allowed = mask.allowed((b, h, n, m), q.device)
    scores = expression.evaluate(expression.parse(region.transform), region.scale * q @ k.repeat_interleave(group, 1).mT)
    if mask.bias is not None:
        scores = scores + mask.bias
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)

    ids, counts = chosen[:2]
    within = sum_blocks(weights.unflatten(1, (h_kv, group)).sum(2), tile, block)
    pairs = sum_blocks(allowed.unflatten(1, (h_kv, group)).any(2).float(), tile, block) > 0
    must = owned(n, m, tile, block, q.device) if region.mask.causal and tile > 1 else None
    order, width = nearest_first(n, m, tile, block, q.device), ids.shape[-1]
    best = lists_from_scores(within, pairs, must, order, width)
    nearest = lists_from_scores(torch.zeros_like(within), pairs, must, order, width)

    def mass(ids: Tensor, counts: Tensor) -> float:
        return float((weights * listed(ids, counts, n, m, tile, block).repeat_interleave(group, 1)).sum(-1).mean())

    sink = None if region.sink is None else values[region.sink]
    best_y, _ = sparse_attention(q, k, v, *best, mask, None, 0.0, region.scale, tile, block, region.transform, sink)
    keys = math.ceil(settings.density * m)
    return AttentionMeasure(
        region.site.module,
        error=relative(sparse, dense),
        mass=mass(ids, counts),
        best_error=relative(best_y, dense),
        best_mass=mass(*best),
        nearest_mass=mass(*nearest),
        keys_mass=float(weights.topk(keys).values.sum(-1).mean()),
    )


def _ffn(decision: Decision, values: dict[Node, Any], sparse: Tensor, chosen: Sequence[Tensor] | None) -> FfnMeasure:
    shares: tuple[float, ...] = ()
    if chosen is not None:
        assert isinstance(decision.settings, FfnSettings)
        offsets = chosen[2].double()
        tokens = offsets[-1] / decision.settings.active
        shares = tuple(round(float(share), 4) for share in offsets.diff() / tokens)
    return FfnMeasure(decision.region.site.module, relative(sparse, values[decision.region.y]), shares)


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in the L2 norm."""
    return float((got - want).norm() / want.norm())


def sum_blocks(x: Tensor, tile: int, block: int) -> Tensor:
    """[..., n, m] -> [..., ceil(n / tile), ceil(m / block)]: the sum over each rectangle."""
    n, m = x.shape[-2:]
    x = torch.nn.functional.pad(x, (0, -m % block, 0, -n % tile))
    return x.unflatten(-1, (-1, block)).sum(-1).unflatten(-2, (-1, tile)).sum(-2)


class _Watching(fx.Interpreter):
    """Runs a graph eagerly and keeps the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, watched: set[Node], values: dict[Node, Any]) -> None:
        super().__init__(gm)
        self._watched, self._values = watched, values

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._watched:
            self._values[n] = value
        return value
