"""Plans as files: the round trip, and every way in which one can be unfit for a model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import sptc
from sptc.benchmark.variants import own_variants
from sptc.cli import main
from sptc.config import ConfigError
from sptc.ir.plan import Choice, Plan, PlannedRegion
from tests.models.gpt import Gpt
from tests.planning_device import DEVICE

ROUTER = {"ffn.selector": "router"}
IDS = torch.randint(99, (2, 19), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr("sptc.backend.calibrate", lambda *_: DEVICE)


def region(key: str, density: float = 0.25, **facts: int) -> PlannedRegion:
    return PlannedRegion(key, (0,), facts, density, (Choice(1.0, 2.0, 0.0), Choice(0.5, 1.5, 0.1), Choice(0.25, 1.0, 0.3)))


def gpt_plan(layers: int = 2, **options: object) -> Plan:
    regions, blocks = [], {"blocks": 16} if options.get("ffn.selector") == "router" else {}
    for i in range(layers):
        regions.append(region(f"blocks.{i}.attention:attention0", 0.25 if i else 1.0, heads=4, key_heads=4, head_size=8))
        regions.append(region(f"blocks.{i}.mlp:ffn0", 0.5, hidden=128, **blocks))
    return Plan({"speedup": 1.5}, options, 3.0, tuple(regions))


def explained(plan: Plan, path, model: nn.Module | None = None, **options: object) -> list[tuple[str, float | None]]:
    plan.save(path)
    report = sptc.explain(model or Gpt(), (IDS, IDS), {"plan": str(path), **options})
    return [(r.status, r.density) for r in report.regions if r.kind != "loss"]


def test_round_trip_and_what_it_predicts(tmp_path):
    plan = gpt_plan(**{"ffn.blocks": 8})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["version"] == 2 and data["regions"][1]["key"] == "blocks.0.mlp:ffn0"
    assert plan.dense_seconds == 3 + 4 * 2 and plan.seconds == 3 + 2 + 1.5 + 1 + 1.5
    assert data["predicted"]["speedup"] == plan.speedup == pytest.approx(11 / 9)
    assert plan.error == pytest.approx((2 * 0.1**2 + 0.3**2) ** 0.5)
    lines = str(plan).splitlines()
    assert lines[3].split() == ["blocks.0.mlp:ffn0", "0.5", "2e+03", "1.5e+03", "0.1", "0", "0"] and "1.22x" in lines[-1]


def test_densities_of_a_plan_win_over_those_of_the_options(tmp_path):
    expected = [("declined", 1.0), ("rewritten", 0.5), ("rewritten", 0.25), ("rewritten", 0.5)]
    assert explained(gpt_plan(), tmp_path / "plan.json") == expected
    assert explained(gpt_plan(), tmp_path / "plan.json", **{"ffn.density": 0.125, "attention.density": 1.0}) == expected


def test_the_option_takes_a_plan_or_its_file(tmp_path):
    plan = gpt_plan(**{"attention.key_block": 3})
    want = explained(plan, tmp_path / "plan.json")
    for given in (plan, plan.to_dict(), tmp_path / "plan.json"):
        options = {"plan": given, "dump": str(tmp_path / "dump")}
        assert [(r.status, r.density) for r in sptc.explain(Gpt(), (IDS, IDS), options).regions if r.kind != "loss"] == want
        (variant,) = own_variants("spt", {"mine": {"plan": given}}, "highest")
        assert Plan.load(json.loads(json.dumps(dict(variant.options)))["plan"]) == plan
    with pytest.raises(ConfigError, match=r"'attention.key_block' is 4, but the plan was made with 3"):
        sptc.explain(Gpt(), (IDS, IDS), {"plan": plan, "attention.key_block": 4})
    with pytest.raises(ConfigError, match="what was given is no plan of version 2"):
        sptc.explain(Gpt(), (IDS, IDS), {"plan": {"regions": []}})
    with pytest.raises(ConfigError, match=r"option 'plan' must be str or dict or None, got \[.{,80}list\)"):
        sptc.explain(Gpt(), (IDS, IDS), {"plan": [plan]})


def test_a_plan_brings_its_options_and_its_own_blocks(tmp_path):
    plan = gpt_plan(**ROUTER, **{"ffn.blocks": 4, "attention.key_block": 3})
    plan = replace(plan, regions=tuple(replace(r, facts={**r.facts, "blocks": 4}) if "ffn" in r.key else r for r in plan.regions))
    plan.save(tmp_path / "plan.json")
    settings = [r.settings for r in sptc.explain(Gpt(), (IDS, IDS), {"plan": str(tmp_path / "plan.json")}).regions]
    assert settings[2]["key_block"] == 3 and settings[3] == {"blocks": 4, "active": 2, "keep": True}
    with pytest.raises(ConfigError, match=r"'ffn.blocks' is 2, but the plan .* was made with 4"):
        explained(plan, tmp_path / "plan.json", **{"ffn.blocks": 2})


def test_a_plan_that_does_not_fit_says_what_differs(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match=r"it has no region blocks\.2\.attention:attention0, blocks\.2\.mlp:ffn0"):
        explained(gpt_plan(), path, Gpt(layers=3))
    with pytest.raises(ConfigError, match=r"has no region blocks\.1\.attention:attention0, blocks\.1\.mlp:ffn0"):
        explained(gpt_plan(), path, Gpt(layers=1))
    with pytest.raises(ConfigError, match=r"hidden of blocks\.0\.mlp:ffn0 is 256, in the plan 128"):
        explained(gpt_plan(), path, widened())
    with pytest.raises(ConfigError, match=r"heads of blocks\.0\.attention:attention0 is 2, in the plan 4"):
        explained(gpt_plan(), path, Gpt(heads=2))
    with pytest.raises(ConfigError, match=r"blocks of blocks\.0\.mlp:ffn0 is 4, in the plan 16"):
        explained(gpt_plan(**ROUTER), path, **{"ffn.blocks": 4})
    model = Gpt()
    sptc.prepare(model, (IDS, IDS), {**ROUTER, "ffn.blocks": 4})
    with pytest.raises(ConfigError, match=r"blocks of blocks\.0\.mlp:ffn0 is 4, in the plan 16"):
        explained(gpt_plan(**ROUTER), path, model)


def widened() -> Gpt:
    model = Gpt()
    for block in model.blocks:
        block.mlp[0], block.mlp[2] = nn.Linear(32, 256), nn.Linear(256, 32)
    return model


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ("[]", "no plan of version 2"),
        ('{"version": 1}', "no plan of version 2"),
        ('{"version": 2, "regions": []}', "not a whole plan"),
        ('{"version": 2, "regions": [{"key": "a", "graphs": [0], "facts": {}, "density": 0.5, "choices": []}]}', "not a whole plan"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path, text, says):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=f"option 'plan': .*{says}"):
        Plan.load(tmp_path / "plan.json")


FACTORY = """
import torch
from tests.models.gpt import Gpt

def gpt():
    torch.manual_seed(0)
    ids = torch.randint(99, (2, 19))
    return Gpt(), (ids, ids)
"""


def test_commands(tmp_path, monkeypatch, capsys):
    (tmp_path / "planned_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["plan", "planned_factory:gpt", "--speedup", "1.1", "--out", "plan.json"]) == 0
    plan = Plan.load("plan.json")
    out, err = capsys.readouterr()
    assert out == f"{plan}\n" and "wrote plan.json" in err and plan.speedup >= 1.1
    assert main(["explain", "planned_factory:gpt", "--plan", "plan.json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(str(plan)) and "regions rewritten" in out
    assert main(["explain", "planned_factory:gpt", "--plan", "plan.json", "--json"]) == 0
    regions = json.loads(capsys.readouterr().out)["regions"]
    assert sorted(r["density"] for r in regions if r["kind"] != "loss") == sorted(r.density for r in plan.regions)
    for arguments, says in (
        (["plan", "planned_factory:gpt", "--speedup", "99"], "out of reach"),
        (["plan", "planned_factory:gpt", "--speedup", "1.2", "--out", "no/such/plan.json"], "no such folder"),
        (["explain", "planned_factory:gpt", "--plan", "p", "--option", "plan=p"], "both given"),
    ):
        assert main(arguments) == 2
        assert f"sptc: {says}" in (error := capsys.readouterr().err) or says in error
