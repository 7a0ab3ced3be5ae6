"""Objective "memory": what keeps less for backward is rewritten, however long it takes, and nothing that is cheap is kept."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import sptc
from sptc.backend import compile_graph
from sptc.config import Config
from sptc.passes.decide.decisions import left_out
from tests.models.compiled import assert_gradients_close, gradients, without_inductor
from tests.passes.decide.test_decisions import Attention, Ffn, decided, qkv
from tests.passes.ffns import D, Gated, batch
from tests.passes.rewrite.test_units import kept_for_backward

MEMORY = {"objective": "memory", "max_rise": 0.0}


class Spelled(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v


def test_hidden_values_are_computed_again_where_that_saves_some() -> None:
    x = torch.randn(10, 64, requires_grad=True)
    (ffn,) = decided(Ffn(), x, **MEMORY, **{"ffn.density": 1.0}).decisions
    assert ffn.rewrite and ffn.settings.recompute and ffn.settings.all_units and ffn.sparse.seconds > ffn.dense.seconds
    assert ffn.reason == "pays: 0.00244 MiB kept for backward instead of 0.0122, hidden values computed again in backward"
    (kept,) = decided(Ffn(), x, **MEMORY, **{"ffn.density": 1.0, "ffn.recompute": False}).decisions
    assert not kept.rewrite and not kept.settings.recompute
    (dense,) = decided(Ffn(), x, **{"ffn.density": 1.0}).decisions
    assert not dense.rewrite and not dense.settings.recompute


def test_ffns_of_many_tokens_are_computed_in_chunks() -> None:
    """Of 2^20 hidden values, unless options say otherwise."""

    def chunk(tokens: int, **options: Any) -> int | None:
        (ffn,) = decided(Ffn(), torch.randn(tokens, 64, requires_grad=True), **{"ffn.density": 1.0, **options}).decisions
        assert (ffn.settings.chunk is None) or f", {ffn.settings.chunk} tokens at a time" in left_out(ffn.settings)
        return ffn.settings.chunk

    most = (1 << 20) // 256
    assert [chunk(tokens, **MEMORY) for tokens in (most, most + 1)] == [None, most]
    assert chunk(most + 1, **MEMORY, **{"ffn.chunk": 0}) is None
    assert chunk(most + 1) is None and chunk(most + 1, **{"ffn.recompute": True}) is None
    assert chunk(10, **{"ffn.chunk": 3}) is None and chunk(10, **{"ffn.chunk": 3, "ffn.recompute": True}) == 3


def test_an_ffn_that_keeps_nothing_is_left_alone() -> None:
    """Below the first adapter nothing is trained, and no hidden value is kept."""
    model = nn.Sequential(Ffn(), nn.Linear(64, 64))
    model[0].requires_grad_(False)
    (ffn,) = decided(model, torch.randn(10, 64), **MEMORY, **{"ffn.density": 1.0}).decisions
    assert not ffn.rewrite and ffn.dense.kept == ffn.sparse.kept


def test_attention_is_rewritten_where_it_keeps_less() -> None:
    inputs, options = qkv(64), {"attention.density": 1.0}
    (timed,), (spelled,) = (decided(Spelled(), inputs, **options, **more).decisions for more in ({}, MEMORY))
    assert timed.sparse.seconds > timed.dense.seconds and not timed.rewrite
    assert spelled.rewrite and spelled.sparse.kept < spelled.dense.kept and "MiB kept for backward instead of" in spelled.reason
    (fused,) = decided(Attention(), inputs, **options, **MEMORY).decisions
    assert fused.sparse.kept == fused.dense.kept and not fused.rewrite, "time decides where memory does not"
    with torch.no_grad():
        (frozen,) = decided(Spelled(), inputs, **options, **MEMORY, inference="sparse").decisions
    assert not frozen.rewrite, "nothing is kept for a backward that there is none of"


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.head(torch.tanh(self.inner(x))), labels)


@pytest.mark.parametrize(
    "classes, rows, frozen, objective, rewritten",
    [
        (16, 64, False, "time", False),  # few classes
        (16, 64, False, "memory", True),  # which keep more than what replaces them all the same
        (64, 4, False, "time", True),  # many
        (64, 4, False, "memory", False),  # but a gradient of the head's weight is more than logits of so few rows
        (64, 4, True, "memory", True),
    ],
)
def test_losses_obey_the_same_rule(classes: int, rows: int, frozen: bool, objective: str, rewritten: bool) -> None:
    model = Classifier(classes)
    model.head.requires_grad_(not frozen)
    unit = decided(model, (torch.randn(rows, 8), torch.randint(classes, (rows,))), objective=objective)
    (loss,) = (d for d in unit.decisions if d.region.kind == "loss")
    assert loss.rewrite == rewritten
    assert objective == "time" or rewritten == (loss.sparse.kept < loss.dense.kept)


class Layer(nn.Module):
    """Norms, attention and an FFN. What is trained reads what the norms give."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.RMSNorm(D), nn.RMSNorm(D)
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.ffn, self.head = Gated(), nn.Linear(D, 99)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (p(y).unflatten(-1, (2, D // 2)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return cross_entropy(self.head(x + self.ffn(self.other(x))).flatten(0, 1), labels.flatten())


def test_what_is_cheap_is_not_kept_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, inputs = Layer(), batch(41)
    reference = copy.deepcopy(model).double()
    want = gradients(reference, reference(inputs[0].double(), inputs[1]))

    def kept(**options: Any) -> int:
        shapes = kept_for_backward(model, inputs, {"max_rise": 0.0, "ffn.recompute": True, **options})
        return sum(math.prod(size for size in shape if isinstance(size, int)) for shape in shapes)

    little, memory = kept(decline="never"), kept(objective="memory", decline="auto")
    monkeypatch.setattr("sptc.backend.KEEPING_LITTLE", {})
    assert kept(decline="never") - little > inputs[0].numel(), "what the norms give"
    assert kept(objective="memory", decline="auto") - memory > inputs[0].numel(), "what the norms give"
    compiled = torch.compile(model, backend=without_inductor(**MEMORY))
    assert_gradients_close(gradients(model, compiled(*inputs)), want)
    assert {r.kind: r.status for r in sptc.report(compiled).regions} == {"attention": "declined", "ffn": "rewritten", "loss": "rewritten"}


@pytest.mark.parametrize("objective", ["memory", "time"])
def test_what_is_random_is_not_drawn_again(objective: str) -> None:
    ffn = Gated()

    def masked(x: Tensor) -> Tensor:
        return torch.dropout(x.sin(), 0.5, True).cos() - 1 + 0 * ffn(x[:, :D].detach()).sum()

    x = torch.ones(64, 512, requires_grad=True)
    compiled = torch.compile(masked, backend="spt", options={"objective": objective, "ffn.density": 0.5, "decline": "never"})
    y = compiled(x)
    y.sum().backward()
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]
    assert x.grad is not None and torch.equal(y != 0, x.grad != 0) and 0.4 < float((y != 0).float().mean()) < 0.6


class Cache(nn.Module):
    """Attention to keys of a buffer that is changed in place after they were read."""

    def __init__(self, changed: bool) -> None:
        super().__init__()
        self.q, self.changed = nn.Linear(D, D), changed
        self.register_buffer("keys", torch.randn(2, 7, D))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        keys = self.keys.relu()
        y = scaled_dot_product_attention(self.q(x), keys, keys)
        if self.changed:
            self.keys.mul_(0.5)
        self.calls.add_(1)
        return y


@pytest.mark.parametrize("changed", [True, False])
def test_what_follows_from_what_is_written_is_kept(changed: bool) -> None:
    torch.manual_seed(0)
    model, x = Cache(changed).double(), torch.randn(2, 9, D, dtype=torch.float64)
    reference, config, kept = copy.deepcopy(model), Config.from_options({"objective": "memory", "max_rise": 0.0}), []

    def partitioned(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        def inner(g: fx.GraphModule, given: list[Any], _: Config) -> Any:
            kept.append(torch._functorch.config.ban_recompute_materialized_backward)
            return aot_eager(g, given)

        return compile_graph(gm, inputs, config, inner=inner)

    compiled = torch.compile(model, backend=partitioned)
    got, want = (gradients(m, call(x).square().sum()) for m, call in ((model, compiled), (reference, reference)))
    assert_gradients_close(got, want)
    assert set(kept) == {changed}, "a counter that is written does not matter"
