"""Figures, tables, JSON and pages of a benchmark whose times are known."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from sptc.benchmark.child.worker import Check
from sptc.benchmark.outcome import Bench, Case, Outcome, Spread, ratio
from sptc.benchmark.show.page import page
from sptc.benchmark.show.plot import check_plot, plot
from sptc.benchmark.show.table import COSTS, TIMES, costs, times
from sptc.benchmark.variants import BenchError, Variant

CHECK = Check(5.5, 0.25, 28, 28, 3.0, 5.5, 0.25, 1.0, 2e-6, 1e-6, 1e-6)
REPORT = {
    "totals": {"seconds_before": 0.5, "seconds_after": 0.2},
    "regions": [{"status": "rewritten"}, {"status": "declined"}, {"status": "refused"}],
}
KINDS = {"attention": 0.25, "products": 0.5, "choosing": 0.0, "rest": 0.25}


def outcome(name: str, backend: str, seconds: list[float], compile_seconds: float, check: Check = CHECK, **more) -> Outcome:
    turns = [[(s, 2 * s)] for s in seconds]
    variant = Variant(name, backend, density_one=name == "spt-density-1")
    return Outcome(variant, check, compile_seconds, 1.0, turns, 500.0, 64.0, KINDS, REPORT if backend == "spt" else None, **more)


@pytest.fixture
def case() -> Case:
    return Case(
        2,
        1024,
        [
            outcome("eager", "eager", [1.0, 1.2, 1.1], 0.0),
            outcome("inductor", "inductor", [0.8, 1.0, 0.9], 20.1),
            outcome("spt-density-1", "spt", [0.8, 1.0, 0.9], 22.0),
            outcome("spt", "spt", [0.4, 0.4, 0.6], 30.0, Check(5.6, 0.3, 27, 28, 3.0, 5.5, 0.25, 0.9, 0.4, 0.4)),
            Outcome(Variant("broken", "spt"), failed="ValueError: <no>", trace="Traceback"),
        ],
        ["the <tokens> are random"],
    )


@pytest.fixture
def bench(case: Case) -> Bench:
    facts = {
        "device": "a processor",
        "threads": 2,
        "processors": 2,
        "python": "3.11",
        "system": "Linux",
        "versions": {"torch": "2.13.0"},
        "sources": "0",
        "commit": None,
        "command": "sptc bench m:f",
        "time": "now",
    }
    settings = {"model": "m:f", "dtype": "fp32", "lora": 16, "counted": 0.25, "checkpointing": False}
    return Bench(facts, settings, [case])


def test_spread_and_ratios_are_of_pairs(case):
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    eager, inductor, _, spt, _ = case.outcomes
    assert case.baseline is inductor
    pairs = ratio(inductor, spt)  # 2, 2.5 and 1.5: the ratio of medians would be 2.25
    assert (pairs.median, pairs.low, pairs.high) == pytest.approx((2.0, 1.75, 2.25))
    assert ratio(inductor, spt, 1).median == pytest.approx(2.0)
    assert ratio(inductor, eager).median < 1


def test_compiling_is_paid_back_by_steps_against_the_best_dense_variant(case):
    eager, inductor, one, spt, broken = case.outcomes
    assert case.paid_back(inductor) == 101, "against eager: 20.1 s by 0.2 s a step"
    assert case.paid_back(spt) == 20, "9.9 s more than Inductor, by 0.5 s a step"
    assert case.paid_back(one) == math.inf and case.paid_back(broken) is None
    assert case.paid_back(eager) is None, "it compiles nothing, and is slower"
    assert case.measured_gain(spt) == pytest.approx(0.5) and spt.predicted_gain() == pytest.approx(0.3)


def test_the_headline_names_the_best_dense_variant_and_what_is_no_sparsity(case):
    said = case.headline()
    assert (
        said == "2 x 1024: spt is 2.00x as fast as inductor, the best dense variant (1.75 to 2.25); at density 1, without sparsity, 1.00x"
    )
    case.outcomes[3].failed = "it"
    assert "nothing to compare" in case.headline()


def test_the_tables_have_a_row_each_and_the_reason_of_a_failure(bench, case):
    rows = {row[0]: dict(zip(TIMES, row, strict=True)) for row in times(case)}
    assert rows["spt"]["faster"] == "2.00x" and rows["spt"]["regions"] == "1 of 2" and rows["spt"]["ms a step"] == "400.0"
    assert rows["inductor"]["faster"] == "best dense" and rows["broken"]["ms a step"] == "failed"
    assert rows["spt"]["gain predicted / measured ms"] == "300 / 500"
    checks = {row[0]: dict(zip(COSTS, row, strict=True)) for row in costs(case)}
    assert checks["spt-density-1"]["check"] == "passed: 2.0e-06, 1.0e-05 allowed" and checks["spt"]["check"] == ""
    assert checks["spt"]["moved"] == "27 of 28" and checks["spt"]["cosine"] == "0.9000" and checks["spt"]["paid back after"] == "20 steps"
    text = str(bench)
    assert "failed: broken: ValueError: <no>" in text and "note: the <tokens> are random" in text and case.headline() in text


def test_a_check_allows_what_rounding_does():
    def passed(error: float | None, dense: float | None, norm: float = 2e-3) -> bool | None:
        return Check(0, 0, 0, 0, 0, error=error, norm_error=norm, dense_error=dense).passed

    assert passed(9e-6, 1e-7) is True and passed(2e-5, 1e-6) is False and passed(2e-2, 1e-2) is True
    assert passed(2e-2, 1e-6, 9e-4) is True, "a ReLU at 0"
    assert passed(math.inf, 1e-6) is False and passed(1e-7, None) is None and passed(None, None) is None


def test_a_variant_off_the_dense_model_is_not_sound(case):
    *sound, broken = case.outcomes
    assert all(o.sound for o in sound) and not broken.sound, "a sparse one is not held to the dense model"
    assert not outcome("spt-density-1", "spt", [1.0], 1.0, Check(0, 0, 0, 0, 0, error=1.0, norm_error=1.0, dense_error=0.0)).sound


def test_json_holds_every_step_and_no_number_that_json_has_not(bench, case):
    case.outcomes[2].check = Check(math.nan, math.inf, 0, 1, 0.0)
    data = json.loads(json.dumps(bench.to_dict(), allow_nan=False))
    assert data["format"] == 1 and data["command"] == "sptc bench m:f" and data["settings"]["lora"] == 16
    (made,) = data["cases"]
    assert made["baseline"] == "inductor" and [v["name"] for v in made["variants"]] == [o.variant.name for o in case.outcomes]
    spt = made["variants"][3]
    assert spt["steps"] == [{"wall": [s], "processor": [2 * s]} for s in (0.4, 0.4, 0.6)]
    assert spt["wall_seconds"]["median"] == 0.4 and spt["faster"]["wall"]["median"] == pytest.approx(2.0)
    assert spt["gain_seconds"] == {"predicted": pytest.approx(0.3), "measured": pytest.approx(0.5)} and spt["report"] == REPORT
    assert made["variants"][2]["check"]["loss"] is None and made["variants"][2]["paid_back"] == "never"
    assert made["variants"][4]["failed"] == "ValueError: <no>" and "wall_seconds" not in made["variants"][4]


def test_the_page_is_well_formed_and_needs_nothing_else(bench):
    text = page(bench)
    body = text.split("</head>")[1].removesuffix("</html>\n").replace("<br>", "<br/>")
    root = ElementTree.fromstring(body)
    assert "src=" not in text and "http" not in text and "<script" not in text
    assert "&lt;no&gt;" in text and "the &lt;tokens&gt; are random" in text
    first, second = ([[(cell.text or "").strip() for cell in row] for row in table.findall(".//tr")] for table in root.findall(".//table"))
    assert (first[0], second[0]) == (list(TIMES), list(COSTS))
    assert [row[1] for row in first if row[0] == "broken"] == ["failed"] and [row[0] for row in second[1:]] == [row[0] for row in first[1:]]
    assert [row[5] for row in second[1:]] == ["", "101 steps", "never", "20 steps", ""]
    widths = [i.get("style") for i in root.findall(".//div[@class='track']/i") if "--sparse" in i.get("style", "")]
    assert widths[0].startswith("width:36.4%"), "0.4 s beside the longest bar, 1.1 s"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots(bench, case, tmp_path, suffix):
    bench.cases.append(Case(2, 2048, case.outcomes))
    path = tmp_path / f"plot.{suffix}"
    check_plot(str(path))
    plot(bench.to_dict(), str(path))
    assert path.stat().st_size > 10_000


def test_a_plot_that_cannot_be_made_is_an_error_before_any_work(monkeypatch):
    with pytest.raises(BenchError, match=r"must end in \.png or \.svg"):
        check_plot("plot.gif")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"pip install 'sptc\[plot\]'"):
        check_plot("plot.png")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_the_bars_in_their_colours(bench, case, tmp_path):
    import matplotlib.image

    for outcome in case.outcomes:
        outcome.step_mib = None  # of the bars of two colours only those of times are left
    (tmp_path / "bench.html").write_text(page(bench))
    shot = tmp_path / "shot.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--window-size=1100,1200",
        f"--screenshot={shot}",
    ]
    subprocess.run(["chromium", *options, (tmp_path / "bench.html").as_uri()], capture_output=True, timeout=100, check=True)
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
    columns = {name: int((pixels == color).all(-1).sum(1).max()) for name, color in COLORS.items()}
    assert columns["sparse"] == pytest.approx(columns["dense"] * 0.4 / 1.1, rel=0.02), "as long as the steps"
    assert columns["attention"] > 0 and columns["products"] > 0


COLORS = {"dense": (0x8A, 0x8F, 0x98), "sparse": (0x2F, 0x85, 0x5A), "attention": (0x4E, 0x79, 0xA7), "products": (0xF2, 0x8E, 0x2B)}
"""As the page defines them."""
