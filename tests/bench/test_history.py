"""The history of step times: what a line holds, and what counts as slower."""

from __future__ import annotations

import json

import pytest

from bench import history


def measured(commit: str, faster: tuple[float, float, float]) -> dict:
    spread = dict(zip(("low", "median", "high"), faster, strict=True))
    sparse = {"name": "both", "exact": False, "failed": None, "faster": {"wall": spread, "processor": spread}}
    variants = [{**sparse, "name": "inductor", "exact": True}, sparse, {"name": "broken", "exact": False, "failed": "no"}]
    settings = {"model": "m:f", "dtype": "bf16", "counted": 1.0}
    facts = {"time": "now", "commit": commit, "versions": {"torch": "2.13.0"}, "device": "a processor", "threads": 2}
    return {**facts, "settings": settings, "cases": [{"batch": 2, "length": 64, "baseline": "inductor", "variants": variants}]}


@pytest.mark.parametrize(
    "now, slower",
    [
        ((1.9, 2.0, 2.1), False),
        ((1.7, 1.8, 1.95), False),  # within the spread
        ((1.6, 1.7, 1.8), True),
        ((1.88, 1.95, 1.89), False),  # beyond the spread, and next to nothing
        ((2.4, 2.5, 2.6), False),
    ],
)
def test_slower_is_what_the_spread_does_not_explain(tmp_path, monkeypatch, capsys, now, slower):
    monkeypatch.setattr(history, "FILE", tmp_path / "history.jsonl")
    for commit, faster in (("old", (1.9, 2.0, 2.1)), ("new", now)):
        (tmp_path / "bench.json").write_text(json.dumps({"shape": measured(commit, faster)}))
        assert history.main(["add", str(tmp_path / "bench.json")]) == 0
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2, "dense variants and failures are no lines"
    assert history.main([]) == int(slower)
    printed = capsys.readouterr().out
    assert ("SLOWER" in printed) == slower and "new" in printed and "old" in printed


def test_cases_of_other_machines_are_other_cases():
    old, new = measured("old", (1.9, 2.0, 2.1)), {**measured("new", (1.0, 1.1, 1.2)), "device": "another"}
    rows, slower = history.compare([*history.lines(old), *history.lines(new)])
    assert len(rows) == 2 and not slower
