"""Whatever is shaped like attention or an FFN is found or refused, and what only shares its operators is left without a word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sptc.config import Config
from sptc.passes.find.regions import find
from sptc.passes.normalize.lower import lower
from sptc.passes.unit import Unit

D, H, HEADS, N, EXPERTS = 16, 24, 4, 6, 3

_library = torch.library.Library("lookalike", "DEF")
_library.define("project(Tensor x, Tensor weight) -> Tensor")
_library.impl("project", lambda x, weight: x @ weight.T, "CompositeExplicitAutograd")
_library.impl("project", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]), "Meta")


def found(model: nn.Module, *inputs: Tensor) -> Unit:
    units: list[Unit] = []

    def backend(gm, example_inputs):
        units.append(find(lower(Unit(gm, tuple(example_inputs), Config()))))
        return gm.forward

    torch.compile(model, backend=backend)(*(inputs or (torch.randn(2, N, D),)))
    (unit,) = units
    return unit


def rules(unit: Unit) -> list[tuple[str, str]]:
    return [(r.kind, r.rule) for r in unit.refusals]


class Attention(nn.Module):
    """Attention with something done to its scores, and to its weights."""

    def __init__(self, scores=lambda s: s, weights=lambda w: w):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.scores, self.weights = scores, weights

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = F.softmax(self.scores(q @ k.mT), -1)
        return (self.weights(weights) @ v).transpose(1, 2).flatten(2)


def long_mask(scores: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1])
    hidden = at > at[:, None]
    for _ in range(20):
        hidden = hidden.logical_not().logical_not()
    return scores.masked_fill(hidden, -1e9)


def through_a_buffer(scores: Tensor) -> Tensor:
    held = scores.new_zeros(scores.shape)
    held[..., :3] = scores[..., :3]
    held[..., 3:] = scores[..., 3:]
    return held


def test_a_mask_of_many_operators_hides_no_attention():
    unit = found(Attention(long_mask))
    (region,) = unit.regions
    assert region.kind == "attention" and region.mask.predicate == "k <= q" and not unit.refusals


@pytest.mark.parametrize(
    ("scores", "weights"),
    [
        (through_a_buffer, lambda w: w),
        (lambda s: s.cumsum(-1), lambda w: w),
        (lambda s: s, lambda w: w.sort(-1).values),
        (lambda s: F.normalize(s, dim=-1), lambda w: w.flip(-1)),
    ],
    ids=["buffer", "cumsum", "sorted", "normalized"],
)
def test_whatever_stands_between_the_products_of_an_attention_is_named(scores, weights):
    unit = found(Attention(scores, weights))
    (refusal,) = unit.refusals
    assert refusal.kind == "attention" and not unit.regions
    assert refusal.site.source.startswith("test_lookalike.py:") and "between" in refusal.reason + refusal.rule


class ByHand(Attention):
    """Attention whose softmax is written as an exponential and a division by its sum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.mT).exp()
        return ((weights @ v) / weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


def test_a_softmax_written_by_hand_is_refused():
    unit = found(ByHand())
    assert rules(unit) == [("attention", "softmax")] and not unit.regions


class Between(nn.Module):
    """Two projections, and something else with the nonlinearity between them."""

    def __init__(self, between, down=None):
        super().__init__()
        self.up, self.between = nn.Linear(D, H), between
        self.down = down if down is not None else nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(F.gelu(self.up(x))))


class Bent(Between):
    """Two projections with nothing but `between` between them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def halves(h: Tensor) -> Tensor:
    """Gated by the other half of the hidden units, in a layout that no region reads."""
    gate, up = h.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat((gate.clamp(-1, 1) * up, up), -1)


class Rotation(nn.Module):
    """Groups of hidden units turned by a matrix each, as orthogonal fine-tuning does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H // 4, 4, 4))

    def forward(self, h: Tensor) -> Tensor:
        return torch.einsum("...gi,gij->...gj", h.unflatten(-1, (H // 4, 4)), self.weight).flatten(-2)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, H))

    def forward(self, h: Tensor) -> Tensor:
        return torch.ops.lookalike.project(h, self.weight)


class Experts(nn.Module):
    """Each token goes through the matrices of the expert that is chosen for it."""

    def __init__(self, stacked: bool):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, D, H)), nn.Parameter(torch.randn(EXPERTS, H, D))
        self.gate, self.stacked = nn.Linear(D, EXPERTS), stacked

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        if self.stacked:
            return F.gelu(x @ self.up).matmul(self.down)[chosen, torch.arange(len(x))] * weight[:, None]
        hidden = F.gelu(torch.bmm(x.unsqueeze(1), self.up[chosen]))
        return torch.bmm(hidden, self.down[chosen]).squeeze(1) * weight[:, None]


class Gated(nn.Module):
    """The output of an attention, gated by a projection of the input."""

    def __init__(self):
        super().__init__()
        self.attention, self.gate, self.down = Attention(), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.attention(x) * torch.sigmoid(self.gate(x)))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv1d(D, H, 1), nn.Conv1d(H, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x.mT)))


FFN_LIKE = {
    "rotation": (lambda: Between(Rotation()), "weights"),
    "custom": (lambda: Between(nn.Identity(), Custom()), "operator"),
    "stacked-experts": (lambda: Experts(True), "weights"),
    "chosen-experts": (lambda: Experts(False), "weights"),
    "gated-attention": (Gated, "operand"),
    "convolution": (Convolution, "operator"),
    "by-cases": (lambda: Between(lambda h: torch.where(h > 0, h, torch.expm1(h))), "between"),
    "own-condition": (lambda: Bent(lambda h: torch.where(h > 0, h, 0.1 * h)), "between"),
    "sine": (lambda: Bent(torch.sin), "between"),
    "rounded": (lambda: Bent(lambda h: h + (h.round() - h).detach()), "between"),
    "by-angle": (lambda: Bent(lambda h: torch.atan2(h, h * h + 1)), "between"),
    "clamped-halves": (lambda: Bent(halves), "between"),
    "sorted": (lambda: Between(lambda h: h.sort(-1).values), "between"),
}


@pytest.mark.parametrize("name", FFN_LIKE)
def test_whatever_bends_between_two_projections_is_refused(name):
    build, rule = FFN_LIKE[name]
    unit = found(build())
    assert rules(unit) == [("ffn", rule)], unit.refusals
    (refusal,) = unit.refusals
    assert refusal.site.source.startswith("test_lookalike.py:")
    assert not [r for r in unit.regions if r.kind == "ffn"]


def test_an_ffn_that_ends_where_another_meets_a_stranger_is_refused_too():
    down, first, last = nn.Parameter(torch.randn(D, H)), nn.Linear(D, H), nn.Linear(D, D)

    def model(x: Tensor) -> Tensor:
        middle = torch.einsum("bnh,dh->bnd", F.silu(first(x)), down)
        return last(F.silu(middle) * last(x))

    unit = found(model)
    assert len([r for r in unit.refusals if r.kind == "ffn"]) == 2, unit.refusals


def test_a_turned_weight_in_a_checkpoint_is_a_weight():
    up, down = nn.Parameter(torch.randn(2 * H, D)), nn.Linear(2 * H, D)
    unit = found(lambda x: checkpoint(lambda x: down(halves(torch.matmul(x.relu(), up.t()))), x, use_reentrant=False))
    assert rules(unit) == [("ffn", "between")], unit.refusals


def test_weights_are_told_from_inputs_in_a_checkpoint():
    up, down = nn.Parameter(torch.randn(H, D)), nn.Linear(H, D)
    unit = found(lambda x: checkpoint(lambda x: down(F.silu(torch.einsum("bnd,hd->bnh", x, up))), x, use_reentrant=False))
    assert rules(unit) == [("ffn", "operand")], unit.refusals


class Adapted(nn.Module):
    """A linear layer with low-rank adapters beside it."""

    def __init__(self, *ranks: int):
        super().__init__()
        self.base = nn.Linear(D, D)
        self.low = nn.ModuleList(nn.Linear(D, r, bias=False) for r in ranks)
        self.high = nn.ModuleList(nn.Linear(r, D, bias=False) for r in ranks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for low, high in zip(self.low, self.high, strict=True):
            y = y + high(low(F.dropout(x, 0.1))) * 0.5
        return y


@pytest.mark.parametrize(("ranks", "rule"), [((2,), "operand"), ((2, 3), "adapters")])
def test_adapters_of_a_layer_are_not_refused_beside_it(ranks, rule):
    model = Gated()
    model.down = Adapted(*ranks)
    assert rules(found(model)) == [("ffn", rule)]


def test_two_adapters_are_one_refusal():
    model = nn.Sequential(nn.Linear(D, D), nn.GELU(), Adapted(2, 3))
    assert rules(found(model)) == [("ffn", "adapters")]


class Stem(nn.Module):
    """A nonlinearity into a residual stream, which every later layer reads through a norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(D, D, 3, padding=1)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)) for _ in range(2))
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.stem(x.mT)).mT
        for layer in self.layers:
            x = x + layer(x)
        return self.head(F.layer_norm(x, (D,)))


class Router(nn.Module):
    """A softmax that weighs experts: no product leads to it."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, EXPERTS), nn.ModuleList(nn.Linear(D, D) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(expert(x) * weights[..., i, None] for i, expert in enumerate(self.experts))


@pytest.mark.parametrize(("build", "regions"), [(Stem, 2), (Router, 0)])
def test_nothing_is_said_of_what_only_shares_operators(build, regions):
    unit = found(build())
    assert len(unit.regions) == regions and not unit.refusals
