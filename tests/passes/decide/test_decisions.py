"""Costs, settings, and one guard for a symbolic length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

import sptc.codegen.ops  # noqa: F401
from sptc.codegen.cpu.attention import default_blocks
from sptc.config import Config
from sptc.device.costs import DeviceCosts, Rates, calibrate
from sptc.ir.region import AttentionSettings, CodebookState, FfnSettings, RouterState, UnitSettings
from sptc.model.capture import capture
from sptc.passes import ANALYSIS
from sptc.passes.decide.decisions import crossover, decide
from sptc.passes.runner import run
from sptc.passes.unit import Unit

RATES = Rates(gemm=1e11, attention=1e11, attention_backward=1e11)
DEVICE = DeviceCosts(
    single=RATES,
    half=RATES,
    bandwidth=2e10,
    exponentials=1e10,
    sparse_attention=5e10,
    sparse_attention_backward=5e10,
    pooled=1e11,
    coded=1e11,
    op_seconds=1e-6,
    attention_seconds=1e-3,
    default_blocks=lambda n, m, density, own: (64, 32),
)


ROUTER = {"ffn.selector": "router"}


class Ffn(nn.Module):
    def __init__(self, size: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Attention(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class SelfAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x)


def judge(gm: fx.GraphModule, inputs: Any, device: DeviceCosts = DEVICE, **options: Any) -> Unit:
    return run(Unit(gm, tuple(inputs), Config.from_options(options), device), ANALYSIS)


def decided(model: nn.Module, inputs: Any, device: DeviceCosts = DEVICE, **options: Any) -> Unit:
    units: list[Unit] = []
    capture(model, inputs, lambda gm, values: units.append(judge(gm, values, device, **options)))
    assert len(units) == 1
    return units[0]


def qkv(n: int, needs: tuple[bool, bool, bool] = (True, True, True), m: int | None = None) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 2, size, 64).requires_grad_(need) for size, need in zip((n, m or n, m or n), needs, strict=True))


@pytest.mark.parametrize(
    "trained, x_needs, products", [("all", True, 6), ("all", False, 5), ("none", True, 4), ("down", False, 3), ("none", False, 2)]
)
def test_dense_ffn_counts_the_products_whose_gradients_are_needed(trained, x_needs, products):
    model = Ffn()
    model.up.requires_grad_(trained == "all")
    model.down.requires_grad_(trained != "none")
    x = torch.randn(10, 64, requires_grad=x_needs)
    (decision,) = decided(model, x, **ROUTER, **{"ffn.density": 0.5}).decisions
    assert decision.dense.flops == products * 2 * 10 * 64 * 256
    router = 2 * 10 * 64 * 16
    assert decision.sparse.flops == decision.dense.flops / 2 + router


def test_no_backward_is_counted_where_gradients_are_off():
    with torch.no_grad():
        (ffn,) = decided(Ffn(), torch.randn(10, 64)).decisions
        (attention,) = decided(Attention(), qkv(256)).decisions
    assert ffn.dense.flops == 2 * 2 * 10 * 64 * 256
    assert attention.dense.flops == 4 * 2 * 256 * 256 * 64


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True), (False, True, True)])
def test_sparse_attention_at_density_one_computes_what_is_needed_of_dense(needs):
    options = {"attention.density": 1.0, "decline": "never"}
    (decision,) = decided(Attention(), qkv(256, needs), **options).decisions
    product = 2 * 2 * 256 * 256 * 64  # two heads
    choosing = 2 * 2 * (256 // 16) * 256 * 64  # means of 16 queries against every key
    assert decision.dense.flops == 7 * product  # a fused backward computes all
    scores = 2 if needs[0] or needs[1] else 1  # computed again, and their gradient
    assert decision.sparse.flops == (2 + scores + sum(needs)) * product + choosing


def test_costs_fall_with_density():
    for model, inputs, option in ((Ffn(), torch.randn(512, 64), "ffn.density"), (Attention(True), qkv(1024), "attention.density")):
        (first, *rest) = [decided(model, inputs, **{option: d}).decisions[0] for d in (0.125, 0.25, 0.5, 1.0)]
        for one, more in zip([first, *rest], rest, strict=False):
            assert one.sparse.flops < more.sparse.flops and one.sparse.seconds < more.sparse.seconds
            assert one.dense == more.dense


def test_scores_that_go_through_memory_cost_more_than_fused_ones():
    class Spelled(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v

    (spelled,), (fused,) = (decided(m, qkv(512)).decisions for m in (Spelled(), Attention()))
    assert spelled.dense.seconds > fused.dense.seconds and spelled.dense.bytes > 10 * fused.dense.bytes
    assert spelled.sparse == fused.sparse


def test_causal_halves_what_the_fused_kernel_computes():
    (causal,), (full,) = (decided(Attention(c), qkv(4096)).decisions for c in (True, False))
    assert 0.5 < causal.dense.flops / full.dense.flops < 0.6


def test_what_pays_on_this_machine():
    device = calibrate(torch.device("cpu"), default_blocks)
    (long,) = decided(Attention(True), qkv(4096), device).decisions
    assert long.rewrite and "pays" in long.reason
    head = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2))
    (pooler,) = decided(head, torch.randn(8, 128), device).decisions
    assert not pooler.rewrite and "would not pay" in pooler.reason
    (tiny,) = decided(Attention(), qkv(16), device).decisions
    assert not tiny.rewrite


def test_options_decide_before_costs_do():
    small = torch.randn(8, 64)
    (forced,) = decided(Ffn(), small, decline="never").decisions
    (auto,) = decided(Ffn(), small).decisions
    (off,) = decided(Ffn(), small, decline="never", **{"ffn.enabled": False}).decisions
    assert [d.rewrite for d in (forced, auto, off)] == [True, False, False]
    assert "'decline'" in forced.reason and "dense" in auto.reason and "'ffn.enabled'" in off.reason
    (attention,) = decided(Attention(), qkv(256), decline="never", **{"attention.enabled": False}).decisions
    assert not attention.rewrite and "'attention.enabled'" in attention.reason


@pytest.mark.parametrize(
    "density, blocks, active", [(0.5, 8, 4), (0.1, 8, 1), (0.7, 8, 6), (0.3, 10, 3), (0.7, 10, 7), (1.0, 8, 8), (1e-9, 8, 1)]
)
def test_active_blocks_are_the_exact_ceiling(density, blocks, active):
    model = Ffn(hidden=240) if blocks == 10 else Ffn()
    options = {**ROUTER, "ffn.density": density, "ffn.blocks": blocks}
    assert decided(model, torch.randn(8, 64), **options).decisions[0].settings == FfnSettings(blocks, active)


def test_blocks_that_do_not_divide_are_refused():
    unit = decided(nn.Sequential(Ffn(hidden=250), Ffn(hidden=256)), torch.randn(8, 64), **ROUTER)
    assert [d.region.hidden for d in unit.decisions] == [256] and [r.hidden for r in unit.regions] == [256]
    (refusal,) = unit.refusals
    assert (refusal.rule, refusal.kind) == ("blocks", "ffn") and "250" in refusal.reason and refusal.site.module == "0"


def test_shapes_of_prepared_state_win_over_options():
    ffn = decided(Ffn(), torch.randn(8, 64), **ROUTER)
    (region,) = ffn.regions
    weight = region.x.graph.placeholder("router")
    weight.meta["val"] = torch.empty(4, 64, device="meta")
    again = decide(replace(ffn, states={region: RouterState(*[weight] * 7, training=True)}))
    assert again.decisions[0].settings == FfnSettings(4, 2)

    attention = decided(Attention(), qkv(256), **{"attention.query_block": 16})
    (region,) = attention.regions
    assert attention.decisions[0].settings == AttentionSettings(0.125, 16, 32, "pooled"), "no codebooks, no pq"
    state = CodebookState(region.q, region.q, region.q, True)
    assert decide(replace(attention, states={region: state})).decisions[0].settings.selector == "pq"


@pytest.mark.parametrize(
    "hint, wins_from, found", [(200, 101, 101), (50, 101, 101), (101, 101, 101), (100, 101, 101), (7, 1, None), (7, 1 << 30, None)]
)
def test_crossover(hint, wins_from, found):
    assert crossover(lambda n: wins_from - 0.5 - n, hint) == found


@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_a_symbolic_length_makes_two_compiles_split_at_the_crossover(kind, dynamic_batch):
    model = Ffn() if kind == "ffn" else SelfAttention()
    compiles: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        (decision,) = judge(gm, inputs, **ROUTER).decisions
        compiles.append(decision.rewrite)
        assert "sparse from" in decision.reason
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    for length in (64, 96, 4096, 2048, 100, 3000):  # the crossover lies between 100 and 2048
        x = torch.randn((2, length, 64) if kind == "ffn" else (2, 2, length, 64), requires_grad=True)
        torch._dynamo.mark_dynamic(x, x.dim() - 2)
        if dynamic_batch:
            torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    assert compiles == [False, True]


def test_a_static_length_adds_no_guard_and_a_sure_decision_neither():
    compiles: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        compiles.append(judge(gm, inputs, decline="never", **{"ffn.density": 0.5}).decisions[0].rewrite)
        return gm.forward

    compiled = torch.compile(Ffn(), backend=backend)
    for length in (64, 4096):
        x = torch.randn(2, length, 64)
        torch._dynamo.mark_dynamic(x, 1)
        compiled(x)
    assert compiles == [True]


@pytest.mark.parametrize("density, units", [(0.5, 128), (0.1, 26), (1.0, 256), (1e-9, 1)])
def test_units_are_the_exact_ceiling(density, units):
    assert decided(Ffn(), torch.randn(8, 64), **{"ffn.density": density}).decisions[0].settings == UnitSettings(256, units)


class Frozen(nn.Module):
    """A reference without gradients, a frozen FFN, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.reference, self.below, self.trained = Ffn(), Ffn().requires_grad_(False), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self.reference(x)
        return self.trained(self.below(x)) - reference


def test_inference_is_dense_unless_asked_otherwise():
    x, never = torch.randn(8, 64), {"decline": "never", "ffn.density": 0.5}

    def rewritten(**options: Any) -> list[bool]:
        return [d.rewrite for d in decided(Frozen(), x, **never, **options).decisions]

    assert rewritten() == [False, True, True]  # frozen or not, what training runs through is sparse
    assert rewritten(inference="sparse") == [True, True, True]
    with torch.no_grad():
        assert rewritten() == [False, False, False]
        (attention,) = decided(Attention(), qkv(256), decline="never").decisions
    assert not attention.rewrite and "no gradient" in attention.reason


def test_a_region_with_trained_state_is_never_declined_by_its_time():
    unit = decided(Ffn(), torch.randn(8, 64), **ROUTER)
    assert not unit.decisions[0].rewrite
    (region,) = unit.regions
    weight = region.x.graph.placeholder("router")
    weight.meta["val"] = torch.empty(4, 64, device="meta")
    state = {region: RouterState(*[weight] * 7, training=True)}
    for grad in (True, False):  # what was trained sparse is evaluated sparse, unless asked otherwise
        with torch.set_grad_enabled(grad):
            assert decide(replace(unit, states=state)).decisions[0].rewrite
    with torch.no_grad():
        dense = replace(unit, states=state, config=Config.from_options({**ROUTER, "inference": "dense"}))
        assert not decide(dense).decisions[0].rewrite


@pytest.mark.parametrize("kind", ["ffn", "attention"])
@pytest.mark.parametrize(("first", "rewritten"), [(64, False), (4096, True)])
def test_a_range_that_the_user_marks_gets_one_side_and_no_guard(kind, first, rewritten):
    """The crossover lies within the range: a guard there would break the promise of mark_dynamic, which Dynamo calls an error."""
    model, reasons = Ffn() if kind == "ffn" else SelfAttention(), []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        (decision,) = judge(
            gm, inputs, **ROUTER, **{"attention.query_block": 32, "attention.key_block": 7}
        ).decisions  # a list has two at 60 keys
        reasons.append((decision.rewrite, decision.reason))
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    for length in (first, 96, 4000):
        x = torch.randn((2, length, 64) if kind == "ffn" else (2, 2, length, 64), requires_grad=True)
        torch._dynamo.mark_dynamic(x, x.dim() - 2, min=60, max=4096)
        compiled(x)
    ((decided, reason),) = reasons
    assert decided is rewritten and reason.endswith("chosen for the whole range that mark_dynamic was given")


def test_a_range_on_one_side_of_the_crossover_needs_no_choice():
    reasons = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        reasons.append(judge(gm, inputs, **ROUTER).decisions[0].reason)
        return gm.forward

    x = torch.randn(2, 64, 64)
    torch._dynamo.mark_dynamic(x, 1, min=8, max=100)
    torch.compile(Ffn(), backend=backend)(x)
    assert len(reasons) == 1 and "sparse from" in reasons[0]


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.head = Ffn(), nn.Linear(64, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = x + self.ffn(x)
        return torch.nn.functional.cross_entropy(self.head(y + y.mean(0)), labels)  # all of them are read


def test_costs_are_those_of_the_share_that_counts() -> None:
    """Tokens that count keep all hidden units, the others an eighth."""
    flops = []
    for counted in (0.25, 0.75):
        labels = torch.zeros(4096, dtype=torch.int64)
        labels[int(counted * 4096) :] = -100
        unit = decided(Labelled(), (torch.randn(4096, 64), labels), **{"ffn.density": 1.0, "ffn.context_density": 0.125})
        (decision,) = (d for d in unit.decisions if d.region.kind == "ffn")
        assert isinstance(decision.settings, UnitSettings) and decision.settings.context == 32
        flops.append(decision.sparse.flops / decision.dense.flops)
    assert flops == pytest.approx([0.25 + 0.75 / 8, 0.75 + 0.25 / 8], abs=0.06)  # and the energies of a sample
