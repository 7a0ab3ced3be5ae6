"""Attention densities by measurement, and attention that is left whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sptc
from sptc.config import Config
from sptc.model.capture import capture
from sptc.passes import ANALYSIS
from sptc.passes.runner import run
from sptc.passes.unit import Unit
from sptc.plans import beside, rise, runs
from tests.models.compiled import without_inductor
from tests.planning_device import DEVICE
from tests.plans.measured import CLASSES, D, batch


class Attending(nn.Module):
    """Two layers of attention; the second one adds next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(50, D), nn.Linear(D, CLASSES)
        self.q = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.v = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        with torch.no_grad():
            self.v[0].weight *= 10
            self.v[1].weight *= 0.001
            self.v[1].bias.zero_()

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for q, v in zip(self.q, self.v, strict=True):
            queries, values = q(x)[:, None], v(x)[:, None]
            x = x + F.scaled_dot_product_attention(queries, queries, values, is_causal=True)[:, 0]
        return self.head(x)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(ids).flatten(0, 1), labels.flatten())


def test_attention_keeps_what_the_model_needs() -> None:
    blocks = {"decline": "never", "attention.query_block": 4, "attention.key_block": 4, "max_rise": 0.001}
    compiled = torch.compile(model := Attending(), backend=without_inductor(**blocks))
    compiled(*batch(64)).backward()
    regions = [r for r in sptc.report(compiled).regions if r.kind == "attention"]
    assert [r.density for r in regions] == [1.0, 0.125] and all("measured" in r.reason for r in regions)
    compiled(*batch(48)).backward()
    assert [r.density for r in sptc.report(compiled).regions if r.kind == "attention"] == [1.0, 0.125] * sptc.report(compiled).graphs
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("rate", "status"), [(1e10, "rewritten"), (3e8, "declined")])
def test_attention_without_a_measurement_leaves_nothing_out(rate: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys, by the kernel that is faster for them: at 3e8 FLOP/s that of sparse attention would only pay for fewer."""
    device = replace(DEVICE, sparse_attention=rate, sparse_attention_backward=rate)
    monkeypatch.setattr("sptc.backend.calibrate", lambda *_: device)
    model = Attending()
    compiled = torch.compile(model.logits, backend=without_inductor())
    torch.testing.assert_close(compiled(batch(64)[0]), model.logits(batch(64)[0]))
    regions = [r for r in sptc.report(compiled).regions if r.kind == "attention"]
    assert [(r.status, r.density) for r in regions] == [(status, 1.0)] * 2
    assert all("no cross entropy" in r.reason and "set attention.density" in r.reason for r in regions)
    assert all(("by the kernel of sparse attention" in r.reason) == (status == "rewritten") for r in regions)
    torch._dynamo.reset()
    given = torch.compile(model.logits, backend=without_inductor(**{"decline": "never", "attention.density": 0.5}))
    given(batch(64)[0])
    assert [r.density for r in sptc.report(given).regions if r.kind == "attention"] == [0.5, 0.5]


def test_what_mark_dynamic_was_promised_holds_at_every_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks depend on the density: 32 is more than a tile at density 1/8, and less than one at density 1."""
    device = replace(DEVICE, default_blocks=lambda n, m, density, own: (64, 64) if density == 1.0 else (4, 2))
    monkeypatch.setattr("sptc.backend.calibrate", lambda *_: device)
    model, given = Attending(), batch(256)
    for tensor in given:
        torch._dynamo.mark_dynamic(tensor, 1, min=32, max=4096)
    compiled = torch.compile(model, backend=without_inductor(max_rise=0.0))
    torch.testing.assert_close(compiled(*given), model(*given))
    assert [r.status for r in sptc.report(compiled).regions if r.kind == "attention"] == ["declined"] * 2


class Averaging(nn.Module):
    """Spelled-out attention whose mask hides padding by a finite number: a query that sees no key averages over all."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(size, 3 * size)

    def forward(self, x: Tensor, seen: Tensor, causal: bool) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        mask = (seen == 0)[:, None, None, :]
        if causal:
            at = torch.arange(x.shape[1])
            mask = mask | (at[None, :] > at[:, None])
        scores = (q @ k.mT * 0.3).masked_fill(mask, torch.finfo(x.dtype).min)
        return (scores.softmax(-1) @ v)[:, 0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{"max_rise": 0.0}, {"attention.density": 1.0}])
def test_queries_that_see_nothing_average_when_nothing_is_left_out(
    causal: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sptc.backend.calibrate", lambda *_: DEVICE)
    model, x, seen = Averaging(), torch.randn(2, 64, 8), torch.ones(2, 64)
    seen[0, :] = 0  # nothing is seen
    seen[1, :5] = 0  # by the first five, where causal
    want = torch.autograd.grad(model(x, seen, causal).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, backend=without_inductor(**options))
    loss = compiled(x, seen, causal).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), want)
    (region,) = sptc.report(compiled).regions
    assert region.status == "declined" and ("averages over all keys" in region.reason or "kept whole" in region.reason)


class Masked(Attending):
    """The same, under a mask whose number may hide every key of a query."""

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        hidden = torch.where(ids == 0, torch.finfo(x.dtype).min, 0.0)[:, None, None]
        for q, v in zip(self.q, self.v, strict=True):
            queries, values = q(x)[:, None], v(x)[:, None]
            x = x + F.scaled_dot_product_attention(queries, queries, values, hidden)[:, 0]
        return self.head(x)


@pytest.mark.parametrize("model, gpu, kernel", [(Attending, False, True), (Attending, True, False), (Masked, False, False)])
def test_attention_that_keeps_all_is_computed_by_the_kernel_that_a_cpu_has_for_it(
    model: type[Attending], gpu: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    rises, call = runs.Runs.rises, beside.Mixed.call_function
    monkeypatch.setattr(runs.Runs, "rises", lambda *args: (ran.append("rises"), rises(*args))[1])
    monkeypatch.setattr(beside.Mixed, "call_function", lambda self, target, *args: (ran.append(target), call(self, target, *args))[1])
    config = Config.from_options({"attention.query_block": 4, "attention.key_block": 4, "max_rise": 1e-5})
    told: list[rise.Rises] = []

    def on_graph(gm: Any, inputs: Any) -> Any:
        unit = run(Unit(gm, tuple(inputs), config, replace(DEVICE, gpu=gpu)), ANALYSIS)
        told.append(rise.weigh_and_tell(unit)[1])
        return gm

    capture(model(), batch(64), on_graph)
    dense = ran[: ran.index("rises")]
    assert (torch.ops.sptc.sparse_attention.default in dense) == kernel
    assert (torch.ops.aten.scaled_dot_product_attention.default in dense) != kernel
    with torch.no_grad():
        assert told[0].loss == pytest.approx(model()(*batch(64)).item(), rel=1e-5)
