"""Plans from example batches: what is measured, what is chosen, and that nothing else happens."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sptc
from sptc.ir.plan import Choice, Plan, PlannedRegion, combined
from sptc.plans import rising
from sptc.plans.budget import PlanError, expected_squares, replan
from sptc.plans.sensitivity import SensitivityError
from tests.models import zoo
from tests.models.compiled import without_inductor
from tests.models.gpt import Gpt
from tests.models.zoo import CASES
from tests.planning_device import DEVICE
from tests.plans import measured


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr("sptc.backend.calibrate", lambda *_: DEVICE)


def densities(plan: sptc.Plan) -> dict[str, float]:
    return {region.key: region.density for region in plan.regions}


def compiled_densities(report: sptc.Report) -> list[tuple[str, str, float | None]]:
    return [(region.module, region.kind, region.density) for region in report.regions if region.kind != "loss"]


def by_key(plan: sptc.Plan) -> list[tuple[str, str, float | None]]:
    return [(r.key.rpartition(":")[0], r.key.rpartition(":")[2].rstrip("0123456789"), r.density) for r in plan.regions]


@pytest.fixture(scope="module")
def gpt():
    """A model and its batch, and a plan of it; one measurement serves several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sptc.backend.calibrate", lambda *_: DEVICE)
        model, inputs = CASES["gpt"].make()
        return model, inputs, sptc.plan(model, inputs, speedup=1.1)


def test_a_plan_reaches_its_target_and_compiles_as_it_says(gpt, tmp_path):
    model, inputs, plan = gpt
    assert plan.speedup >= 1.1
    assert {c.density for c in plan.regions[0].choices} == {1.0, 0.5, 0.25, 0.125, 0.0625}
    assert any(d < 1 for d in densities(plan).values())
    plan.save(tmp_path / "plan.json")
    options = {"plan": str(tmp_path / "plan.json")}
    assert sorted(compiled_densities(sptc.explain(model, inputs, options))) == sorted(by_key(plan))
    compiled = torch.compile(model, backend=without_inductor(**options))
    compiled(**inputs).backward()
    assert sorted(compiled_densities(sptc.report(compiled))) == sorted(by_key(plan))
    assert "\n" in str(plan) and all(r.key in str(plan) for r in plan.regions)


def test_a_plan_within_a_rise_is_what_a_first_batch_would_choose(tmp_path):
    model, inputs = CASES["gpt"].make()
    plan = sptc.plan(model, inputs, max_rise=0.05)
    assert any(d < 1 for d in densities(plan).values())
    assert plan.loss is not None and 0 < plan.rise <= 0.05 * plan.loss and "rises by" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    by_plan = sptc.explain(model, inputs, {"plan": str(tmp_path / "plan.json")})
    measured = sptc.explain(model, inputs, {"max_rise": 0.05})
    assert compiled_densities(by_plan) == compiled_densities(measured)
    assert sorted(compiled_densities(by_plan)) == sorted(by_key(plan))
    assert not any("measured" in region.reason for region in by_plan.regions)


def test_a_plan_within_a_rise_needs_the_loss():
    model, inputs = CASES["gpt"].make()
    with pytest.raises(SensitivityError, match="computes no cross entropy"):
        sptc.plan(WithoutLoss(model), inputs["ids"], max_rise=0.05)
    assert set(densities(sptc.plan(WithoutLoss(model), inputs["ids"], max_rise=0.0)).values()) == {1.0}


class OptionalLoss(Gpt):
    """As models of Hugging Face: the loss with labels, logits without."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(ids, labels) if labels is not None else WithoutLoss.forward(self, ids)


def test_a_plan_by_the_models_loss_serves_a_trainer_with_a_loss_of_its_own(tmp_path):
    """Of all tokens, since the graph then does not tell which count."""
    torch.manual_seed(0)
    model, ids = OptionalLoss(), torch.randint(0, 99, (4, 64))
    plan = sptc.plan(model, {"ids": ids, "labels": ids}, max_rise=0.05, options={"ffn.context_density": None})
    plan.save(tmp_path / "plan.json")
    assert not any(r.apart for r in plan.regions) and any(r.density < 1 for r in plan.regions if r.kind == "ffn")
    report = sptc.explain(model, {"ids": ids}, {"plan": str(tmp_path / "plan.json"), "ffn.context_density": None})
    assert sorted(compiled_densities(report)) == sorted(by_key(plan))


def test_densities_of_the_context_are_for_no_other_tokens(tmp_path):
    """Where all labels count, or none is given, an FFN would lose units of tokens that the plan has dense."""
    model, inputs = CASES["gpt"].make()
    few = {**inputs, "labels": inputs["labels"].clone()}
    few["labels"][:, : few["labels"].shape[1] // 2] = -100
    plan = sptc.plan(model, few, max_rise=0.5)
    (apart,) = (r for r in plan.regions if r.apart and r.density < 1)  # of the last FFN only tokens that count are read
    assert apart.key == "blocks.0.mlp:ffn0"
    plan.save(tmp_path / "plan.json")

    def of_it(batch: dict[str, Tensor]) -> Any:
        report = sptc.explain(model, batch, {"plan": str(tmp_path / "plan.json")})
        return next(r for r in report.regions if r.kind == "ffn" and r.module in apart.key)

    assert of_it(few).density == apart.density
    assert of_it(inputs).status == "declined" and "not told apart here" in of_it(inputs).reason


class Broken(measured.Model):
    """One FFN in two graphs, of which the second has the loss, or the whole model twice, with other labels."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        if self.twice:
            first = super().forward(ids, labels)
            torch._dynamo.graph_break()
            return first + super().forward(ids[:, 2:], labels[:, 2:])
        x = self.tokens(ids)
        x = self.mixer(x + self.ffns[1](x))
        torch._dynamo.graph_break()
        return F.cross_entropy(self.head(x + self.ffns[1](x)).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("twice", [False, True])
def test_a_region_of_two_graphs_keeps_what_either_of_them_needs(twice, tmp_path):
    """All, where one can't be measured, or tells tokens apart and the other does not."""
    options = {"decline": "never", "attention.enabled": False}
    ids, labels = measured.batch()
    if twice:
        labels[:, :2] = -100  # of twelve: apart in the first graph, and in the second all count
    plan = sptc.plan(Broken(twice), (ids, labels), max_rise=0.5, options=options)
    assert plan.loss is not None and set(densities(plan).values()) == {1.0} and all(r.graphs == (0, 1) for r in plan.regions)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and str(plan)


def test_a_region_of_two_graphs_keeps_the_greater_density():
    def region(*densities: float, chosen: float) -> PlannedRegion:
        return PlannedRegion("ffn0", (0,), {}, chosen, tuple(Choice(d, 1.0, 1.0 - d, 2.0) for d in (1.0, *densities)))

    dense, sparse = region(0.75, chosen=0.75), region(0.75, 0.5, chosen=0.5)
    for before, after in itertools.permutations((dense, sparse)):
        both = rising._once_more(before, after)
        assert both.density == 0.75 and both.chosen == Choice(0.75, 2.0, 0.25, 4.0)


class WithoutLoss(nn.Module):
    """What the loss of a GPT is computed from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        model: Any = getattr(self, "model", self)
        x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
        for block in model.blocks:
            x = block(x)
        return model.head(model.norm(x))[:, :-1]


def test_the_error_of_a_region_is_that_of_a_compile_with_it_alone(gpt, tmp_path):
    model, inputs, plan = gpt
    region = next(r for r in plan.regions if "ffn" in r.key)
    alone = replace(plan, regions=tuple(replace(r, density=0.25 if r is region else 1.0) for r in plan.regions))
    model = WithoutLoss(model)
    renamed = replace(alone, regions=tuple(replace(r, key=f"model.{r.key}") for r in alone.regions))
    renamed.save(tmp_path / "plan.json")
    compiled = torch.compile(model, backend=without_inductor(plan=str(tmp_path / "plan.json"), inference="sparse"))
    with torch.no_grad():
        dense, sparse = model(inputs["ids"]), compiled(inputs["ids"])
    assert float((sparse - dense).norm() / dense.norm()) == pytest.approx(alone.error, rel=1e-4) and alone.error > 0


def test_larger_targets_give_nested_plans(gpt):
    model, inputs, plan = gpt
    plans = [replan(plan, speedup=s) for s in (1.03, 1.06, 1.1, 1.2)]
    assert plans[2] == plan
    for slow, fast in itertools.pairwise(plans):
        assert slow.seconds >= fast.seconds and slow.error <= fast.error
        assert all(slow_d >= fast_d for slow_d, fast_d in zip(densities(slow).values(), densities(fast).values(), strict=True))
    assert sptc.plan(model, inputs, max_error=plan.error).seconds <= plan.seconds  # and, measured again, the same figures


def test_as_fast_as_uniform_densities(gpt):
    model, inputs, plan = gpt
    uniform = plan.uniform(attention=0.125, ffn=0.5)
    assert set(by_key(uniform)) == {(r.key.rpartition(":")[0], r.kind, {"attention": 0.125, "ffn": 0.5}[r.kind]) for r in plan.regions}
    rows = [
        r
        for r in sptc.explain(model, inputs, {"decline": "never", "attention.density": 0.125, "ffn.density": 0.5}).regions
        if r.kind != "loss"
    ]
    assert uniform.seconds == pytest.approx(plan.other_seconds + sum(r.seconds_sparse for r in rows))
    assert uniform.dense_seconds == plan.dense_seconds
    assert replan(plan, speedup=uniform.speedup).speedup >= uniform.speedup > 1
    assert replan(uniform, speedup=1.1) == plan
    with pytest.raises(ValueError, match=r"ffn at density 0.6, only at 0.75, 0.625, 0.5, 0.375, 0.25"):
        plan.uniform(attention=0.125, ffn=0.6)


def test_uniform_densities_of_a_region_that_is_not_faster_at_each():
    dense, half = Choice(1.0, 2.0, 0.0), Choice(0.5, 1.0, 0.1)
    short = PlannedRegion("a:attention0", (0,), {}, 1.0, (dense, half))
    off = PlannedRegion("a:ffn0", (0,), {}, 1.0, (dense,))  # its kind is switched off
    long = replace(short, key="b:attention0", choices=(dense, half, Choice(0.125, 0.5, 0.2)))
    assert densities(Plan({}, {}, 0.0, (short, off, long)).uniform(0.125, 0.5)) == {
        "a:attention0": 0.5,
        "a:ffn0": 1.0,
        "b:attention0": 0.125,
    }


@pytest.mark.parametrize("name", ["gpt", "llama-eager-padded", "decoder-post-padded"])
def test_no_error_allowed_keeps_everything_dense(name):
    model, inputs = CASES[name].make()
    plan = sptc.plan(model, inputs, max_error=0)
    assert len(plan.regions) == len(CASES[name].attention) + CASES[name].ffn
    assert set(densities(plan).values()) == {1.0} and plan.speedup == 1.0 and plan.error == 0.0


def test_dropout_is_no_part_of_an_error():
    plans = [sptc.plan(*CASES["bert-eager"].make(dropout), max_error=0.1) for dropout in (0.0, 0.3)]
    errors = [[c.error for r in plan.regions for c in r.choices] for plan in plans]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5) and max(errors[0]) > 0


def test_an_unprepared_or_prepared_model_is_left_as_it_was_and_prepared_by_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "BATCH", 16)  # a block with few tokens would not pay
    model, inputs = CASES["gpt2-sdpa"].make(0.1)  # two graphs
    wrapped = nn.ModuleDict({"gpt": model})

    def state() -> tuple[Any, ...]:
        hooks = [(name, list(m._forward_hooks.values()), m.training) for name, m in wrapped.named_modules()]
        return copy.deepcopy(wrapped.state_dict()), hooks, torch.get_rng_state(), random.getstate()

    def check(before: tuple[Any, ...]) -> None:
        after = state()
        torch.testing.assert_close(dict(before[0]), dict(after[0]), rtol=0, atol=0)
        assert before[1] == after[1] and torch.equal(before[2], after[2]) and before[3] == after[3]
        assert all(p.grad is None for p in wrapped.parameters())

    before = state()
    bare = sptc.plan(model, inputs, max_error=10.0, options={"ffn.selector": "router"})  # everything sparse
    check(before)
    bare.save(tmp_path / "bare.json")
    report = sptc.prepare(model, inputs, {"plan": str(tmp_path / "bare.json")})
    assert sorted(compiled_densities(report)) == sorted(by_key(bare))
    assert all(density < 1 for density in densities(bare).values()) and any("spt" in name for name, _ in model.named_parameters())
    before = state()
    prepared = sptc.plan(model, inputs, max_error=10.0)
    check(before)
    assert densities(prepared).keys() == densities(bare).keys() and prepared != bare  # its own routers choose


def test_the_sensitive_region_keeps_more():
    torch.manual_seed(0)
    model, ids = Gpt(), torch.randint(99, (2, 19))
    first, last = (block.mlp for block in model.blocks)
    with torch.no_grad():
        for p in first[2].parameters():
            p *= 50.0
        for p in last[2].parameters():
            p *= 0.02
    plan = sptc.plan(model, (ids, ids), speedup=1.1, options={"attention.enabled": False})
    kept = densities(plan)
    assert kept["blocks.0.mlp:ffn0"] > kept["blocks.1.mlp:ffn0"]
    assert kept["blocks.0.attention:attention0"] == 1.0 and plan.options == {"attention.enabled": False}


def test_targets_that_make_no_sense_or_are_out_of_reach():
    model, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), torch.randn(64, 16)
    for target, says in (
        ({}, "exactly one"),
        ({"speedup": 1.5, "max_error": 0.1}, "exactly one"),
        ({"speedup": 1.0}, "above 1"),
        ({"max_error": -0.1}, "at least 0"),
        ({"speedup": 1.5, "max_memory": 1e6}, "exactly one"),
        ({"max_memory": 0}, "bytes above 0"),
        ({"max_memory": float("nan")}, "bytes above 0"),
        ({"max_memory": "2GB"}, "max_memory must be a number of bytes, got '2GB'"),
        ({"speedup": True}, "speedup must be a number, got True"),
        ({"speedup": 1.5, "options": {"plan": "p.json"}}, "applying a plan"),
    ):
        with pytest.raises(PlanError, match=says):
            sptc.plan(model, x, **target)
    with pytest.raises(PlanError, match="out of reach") as error:
        sptc.plan(model, x, speedup=100)
    best = float(str(error.value).split("fastest it is ")[1].split()[0])
    assert sptc.plan(model, x, speedup=best).speedup >= best > 1
    with pytest.raises(SensitivityError, match="no floating tensor"):
        sptc.plan(lambda x: model(x).argmax(-1), x, speedup=1.1)


def test_no_other_choice_of_the_same_time_has_a_smaller_expected_error():
    draw = random.Random(0)
    for _ in range(30):
        regions = []
        for key in "abc":
            tried = [Choice(density, draw.uniform(0.1, 1.2), draw.uniform(0, 1)) for density in (0.5, 0.25, 0.125)]
            regions.append(PlannedRegion(f"{key}:ffn0", (0,), {}, 1.0, (Choice(1.0, 1.0, 0.0), *tried)))
        squares = expected_squares(regions)
        every = [[(c.seconds, squares[r.key, c.density]) for c in r.choices] for r in regions]
        for allowed in (0.3, 0.6, 1.0):
            planned = replan(Plan({}, {}, 1.0, tuple(regions)), max_error=allowed).regions
            assert combined(r.chosen.error for r in planned) <= allowed
            seconds = sum(r.chosen.seconds for r in planned)
            mixes = [mix for mix in itertools.product(*every) if sum(s for s, _ in mix) <= seconds + 1e-12]
            assert sum(squares[r.key, r.density] for r in planned) == pytest.approx(min(sum(e for _, e in mix) for mix in mixes))


def test_errors_to_choose_by_are_halfway_to_the_mean_of_the_kind():
    dense = Choice(1.0, 1.0, 0.0)
    low, high = (PlannedRegion(f"{k}:ffn0", (0,), {}, 1.0, (dense, Choice(0.5, 0.5, e))) for k, e in (("a", 1.0), ("b", 3.0)))
    other = PlannedRegion("a:attention0", (0,), {}, 1.0, (dense, Choice(0.5, 0.5, 7.0)))
    squares = expected_squares((low, high, other))
    assert squares["a:ffn0", 0.5] == 3.0 and squares["b:ffn0", 0.5] == 7.0 and squares["a:attention0", 0.5] == 49.0
    assert squares["a:ffn0", 1.0] == 0.0
