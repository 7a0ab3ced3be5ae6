"""What is left alone: modules that `exclude` names, and trained heads; everything that adds to a residual stream is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sptc.config import Config, ConfigError
from sptc.passes.find.regions import find
from sptc.passes.normalize.lower import lower
from sptc.passes.unit import Unit

D, H, N, LABELS = 16, 32, 6, 5


class Mlp(nn.Module):
    def __init__(self, out: int = D, act=F.gelu):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, H), nn.Linear(H, out), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Model(nn.Module):
    """Two layers around a residual stream, and what reads it."""

    def __init__(self, head: nn.Module, pooled: bool = False, checkpointed: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(2))
        self.norm, self.head, self.pooled, self.checkpointed = nn.LayerNorm(D), head, pooled, checkpointed

    def layer(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return x + mlp(F.layer_norm(x, (D,)))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for mlp in self.layers:
            x = checkpoint(self.layer, mlp, x, use_reentrant=False) if self.checkpointed else self.layer(mlp, x)
        x = self.norm(x)
        y = self.head(x[:, 0] if self.pooled else x)
        return F.cross_entropy(y, labels) + 0.1 * y.square().mean() if self.pooled else y


def found(model: nn.Module, **options) -> tuple[list[str], list[tuple[str, str]]]:
    """(modules of regions, (rule, module) of refusals)."""
    units: list[Unit] = []

    def backend(gm, example_inputs):
        units.append(find(lower(Unit(gm, tuple(example_inputs), Config.from_options(options)))))
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(2, N, D), torch.randint(0, LABELS, (2,)))
    (unit,) = units
    return [r.site.module for r in unit.regions], [(r.rule, r.site.module) for r in unit.refusals if r.kind != "loss"]


LAYERS = ["layers.0", "layers.1"]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("pooled", [False, True], ids=["value", "classifier"])
def test_a_trained_head_is_left_alone(pooled, checkpointed):
    regions, refusals = found(Model(Mlp(LABELS, torch.tanh), pooled, checkpointed))
    assert regions == LAYERS and refusals == [("head", "head")]


def test_an_empty_list_leaves_nothing_alone():
    regions, refusals = found(Model(Mlp(LABELS)), exclude=[])
    assert sorted(regions) == ["head", *LAYERS] and not refusals


def test_a_frozen_head_is_no_matter_of_training():
    model = Model(Mlp(LABELS))
    model.head.requires_grad_(False)
    assert found(model) == ([*LAYERS, "head"], [])


class Wide(nn.Module):
    """A last block that changes the width and adds to a stream of its own."""

    def __init__(self):
        super().__init__()
        self.mlp, self.skip = Mlp(2 * D), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.mlp(x)


@pytest.mark.parametrize("head", [Mlp, Wide], ids=["same-width", "adds"])
def test_what_may_be_or_is_a_block_of_a_stream_is_no_head(head):
    regions, refusals = found(Model(head()))
    assert len(regions) == 3 and not refusals


class Parted(Model):
    """The head stands after a graph break."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for mlp in self.layers:
            x = self.layer(mlp, x)
        torch._dynamo.graph_break()
        return self.head(x)


@pytest.mark.parametrize(("head", "rule"), [(Mlp(LABELS), ["head"]), (Mlp(), []), (Wide(), [])], ids=["head", "same-width", "adds"])
def test_a_head_after_a_graph_break_is_one_too(head, rule):
    units: list[Unit] = []

    def backend(gm, example_inputs):
        units.append(find(lower(Unit(gm, tuple(example_inputs), Config()))))
        return gm.forward

    torch.compile(Parted(head), backend=backend)(torch.randn(2, N, D), torch.zeros(2))
    layers, after = units
    assert len(layers.regions) == 2 and [r.rule for r in after.refusals] == rule and len(after.regions) == 1 - len(rule)


def test_an_ffn_alone_is_no_head():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Mlp(LABELS)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.mlp(x)

    assert found(Alone()) == (["mlp"], [])


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["layers.0"], ["layers.1"]),
        (["layers.*"], []),
        (["layers"], []),  # a module around them
        (["*.1.down"], ["layers.0"]),  # a module inside
        (["nothing", "layers.1"], ["layers.0"]),
        (["layer?"], LAYERS[:0]),
        (["ayers.0", "layers.0*x", ""], LAYERS),
    ],
)
def test_patterns_match_names_of_modules_in_and_around_a_region(patterns, left):
    regions, refusals = found(Model(nn.Linear(D, D)), exclude=patterns)
    assert regions == left
    assert refusals == [("exclude", name) for name in LAYERS if name not in left]


@pytest.mark.parametrize(
    ("value", "says"), [("layers.0", "'exclude' must be list or None"), ([3], "'exclude' must hold patterns of module names, got 3")]
)
def test_mistakes_are_named(value, says):
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        Config.from_options({"exclude": value})
