"""Plans for a budget of what is kept for backward: exact forms first, hidden units only where these may not be used."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import sptc
from sptc.plans.budget import PlanError, replan
from tests.models.compiled import assert_gradients_close, gradients, without_inductor
from tests.models.zoo import CASES
from tests.planning_device import DEVICE


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr("sptc.backend.calibrate", lambda *_: DEVICE)


@pytest.fixture(scope="module")
def llama():
    """A model with attention that is spelled out and its batch, and a plan that keeps little; one measurement serves several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sptc.backend.calibrate", lambda *_: DEVICE)
        model, inputs = CASES["llama-eager"].make()
        least = sptc.plan(model, inputs, max_error=0.0)
        lean = sum(min(c.kept for c in r.choices if c.density == 1.0) for r in least.regions)
        return model, inputs, sptc.plan(model, inputs, max_memory=least.losses_kept + lean)


def kept(report: sptc.Report) -> float:
    return report.totals()["kept_after"]


def test_what_is_exact_comes_first_and_compiles_as_the_plan_says(llama, tmp_path):
    model, inputs, plan = llama
    assert plan.error == 0.0 and {r.kind for r in plan.regions} == {"attention", "ffn"}
    assert all(r.lean and r.density == 1.0 for r in plan.regions) and plan.kept < 0.8 * plan.dense_kept
    plan.save(tmp_path / "plan.json")
    assert sptc.Plan.load(tmp_path / "plan.json") == plan
    options = {"plan": str(tmp_path / "plan.json"), "loss.logits": "drop"}
    explained = sptc.explain(model, inputs, options)
    assert {r.status for r in explained.regions if r.kind != "loss"} == {"rewritten"}
    assert {r.settings["recompute"] for r in explained.regions if r.kind == "ffn"} == {True}
    reference = copy.deepcopy(model).double()
    want = gradients(reference, reference(**inputs).loss)
    compiled = torch.compile(model, backend=without_inductor(**options))
    assert_gradients_close(gradients(model, compiled(**inputs).loss), want)
    assert kept(sptc.report(compiled)) == kept(explained)
    assert f"{plan.kept / 1e6:.3g} MB kept for backward" in str(plan)


def test_the_report_of_a_compile_predicts_what_the_plan_does(llama, tmp_path):
    model, inputs, plan = llama
    for share in (1.0, 0.9, 0.8):
        budget = plan.kept + share * (plan.dense_kept - plan.kept)
        made = replan(plan, max_memory=budget)
        made.save(tmp_path / "plan.json")
        assert kept(sptc.explain(model, inputs, {"plan": str(tmp_path / "plan.json")})) == pytest.approx(made.kept)
        assert made.kept <= budget


def test_smaller_budgets_give_nested_plans_and_cost_time(llama):
    _, _, plan = llama
    plans = [replan(plan, max_memory=plan.kept + share * (plan.dense_kept - plan.kept)) for share in (1.0, 0.7, 0.4, 0.0)]
    assert not any(r.lean for r in plans[0].regions)
    for more, less in itertools.pairwise(plans):
        assert more.kept > less.kept
        assert {r.key for r in more.regions if r.lean} < {r.key for r in less.regions if r.lean}


def test_units_are_left_out_where_nothing_may_be_computed_again(tmp_path):
    model, inputs = CASES["gpt"].make()
    options = {"attention.enabled": False, "ffn.recompute": False}
    dense = sptc.plan(model, inputs, max_error=0.0, options=options)
    assert not any(c.lean for r in dense.regions for c in r.choices)
    plan = replan(dense, max_memory=0.8 * dense.kept)
    assert plan.error > 0 and plan.kept <= 0.8 * dense.kept and not any(r.lean for r in plan.regions)
    assert any(r.density < 1 for r in plan.regions)


def test_out_of_reach_says_what_is_within(llama):
    _, _, plan = llama
    with pytest.raises(PlanError, match=r"a memory of 1 bytes is out of reach: .* (\d+) are kept for backward") as error:
        replan(plan, max_memory=1)
    least = float(str(error.value).split("keeps least, ")[1].split()[0])
    assert replan(plan, max_memory=least).kept <= least


def test_what_options_have_computed_again_is_where_a_plan_starts():
    model, inputs = CASES["gpt"].make()
    plans = [sptc.plan(model, inputs, max_error=0.0, options={"attention.enabled": False, **o}) for o in ({}, {"objective": "memory"})]
    assert plans[1].kept < plans[0].kept and plans[1].kept == replan(plans[1], max_memory=plans[1].kept).kept
    assert not any(c.lean for r in plans[1].regions for c in r.choices)
