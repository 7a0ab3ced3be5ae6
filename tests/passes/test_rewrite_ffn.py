"""A prepared FFN, routed: its output and every gradient are those of a plain definition, in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

import sptc
from sptc.codegen.reference.ffn import budgets
from tests.models.compiled import assert_gradients_close, gradients, without_inductor

D, HIDDEN, BLOCKS, ACTIVE, CLASSES = 12, 32, 8, 3, 5
OPTIONS = {"decline": "never", "ffn.selector": "router", "ffn.blocks": BLOCKS, "ffn.density": ACTIVE / BLOCKS}


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """A loss over some tokens, so that `ffn.keep` gives these more blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.ffn, self.head = nn.Linear(D, D), Ffn(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.first(x)
        return F.cross_entropy(self.head(x + self.ffn(x)).flatten(0, 1), labels.flatten())


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (2, 7), generator=generator)
    labels[0, 2:] = labels[1, ::2] = -100
    return torch.randn(2, 7, D, generator=generator), labels


def prepared() -> Model:
    """With adapters, and state that is no longer what it started from."""
    torch.manual_seed(0)
    model = Model()
    for name in ("gate", "up", "down"):
        setattr(model.ffn, name, LoraLinear(getattr(model.ffn, name), "default", LoraConfig(), r=4, lora_alpha=6))
    sptc.prepare(model, batch(), OPTIONS)
    with torch.no_grad():
        for name, p in model.ffn.named_parameters():
            if "lora" in name or "spt" in name:
                p.add_(0.5 * torch.randn_like(p))
    return model


def routed(ffn: Ffn, x: Tensor, shares: list[int]) -> Tensor:
    """Token t uses the `shares[t]` best blocks (docs/architecture.md, State)."""
    s = ffn.spt.slots()["ffn0"]
    added = F.linear(x, s.weight, s.bias)
    order = (F.linear(x, s.start_weight, s.start_bias) + added).argsort(1, descending=True)
    active = torch.zeros(len(x), BLOCKS, dtype=x.dtype)
    for t, best in enumerate(order):
        active[t, best[: shares[t]]] = 1.0
    share = active.mean(1, keepdim=True)
    scale = (active * 2 * torch.sigmoid(added)).repeat_interleave(HIDDEN // BLOCKS, 1)

    def linear(layer: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(layer, LoraLinear):
            return layer(x)
        return layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x) * layer.scaling["default"] / share)

    y = linear(ffn.down, scale * F.silu(ffn.gate(x)) * ffn.up(x))
    return y + 2 * (1 - share) * F.linear(F.linear(x, s.low), s.high, s.constant)


@pytest.mark.parametrize("keep", ["loss", None])
def test_a_prepared_ffn_equals_its_definition(keep: str | None) -> None:
    model = prepared()
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    compiled = torch.compile(model, backend=without_inductor(**OPTIONS, **{"ffn.keep": keep}))
    got = gradients(model, loss := compiled(x, labels))
    (region,) = (r for r in sptc.report(compiled).regions if r.kind == "ffn")
    assert region.status == "rewritten"

    counts = (labels != -100).flatten().tolist()
    shares = budgets(counts, BLOCKS, ACTIVE) if keep else [ACTIVE] * len(counts)
    assert (min(shares) < ACTIVE < max(shares)) == bool(keep)
    h = reference.first(x.double()).flatten(0, 1)
    expected = F.cross_entropy(reference.head(h + routed(reference.ffn, h, shares)), labels.flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    want = gradients(reference, expected)
    assert {"ffn.spt.ffn0.weight", "ffn.spt.ffn0.low", "ffn.gate.lora_A.default.weight", "ffn.down.lora_B.default.weight"} <= want.keys()
    assert_gradients_close(got, want)


def test_a_prepared_ffn_begins_near_the_dense_one() -> None:
    """Scales start at 1, and what is left out is stood in for: nearer than its blocks alone, on the batch that it was prepared with."""
    torch.manual_seed(0)
    model, (x, labels) = Model(), batch()
    x = torch.randn(64, 7, D)
    labels = torch.zeros(64, 7, dtype=torch.int64)
    sptc.prepare(model, (x, labels), OPTIONS)
    h = model.first(x).flatten(0, 1)
    shares = [ACTIVE] * len(h)
    state = model.ffn.spt.slots()["ffn0"]
    assert not state.weight.any() and not state.bias.any()
    with torch.no_grad():
        dense = model.ffn(h)
        error = (routed(model.ffn, h, shares) - dense).norm()
        state.high.zero_()
        state.constant.zero_()
        assert error < 0.9 * (routed(model.ffn, h, shares) - dense).norm()
