"""What AOTAutograd has on disk is of the sources that traced it: after an upgrade it is not used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from sptc.device import fingerprint as module
from tests.models.compiled import FULL


@pytest.mark.parametrize("changed", ["codegen/ops/attention.py", "passes/rewrite/units.py", "codegen/cpu/native/attention.cpp", "new.py"])
def test_every_source_counts_and_its_place_does_not(tmp_path, monkeypatch, changed):
    def digest(root: Path) -> str:
        monkeypatch.setattr(module, "__file__", str(root / "device" / "fingerprint.py"))
        return module.fingerprint.__wrapped__()

    own = Path(module.__file__).parents[1]
    copy = tmp_path / "elsewhere"
    shutil.copytree(own, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = digest(own)
    assert digest(copy) == before
    with (copy / changed).open("a") as source:
        source.write(" ")
    assert digest(copy) != before


def test_other_sources_never_run_what_is_in_a_warm_cache(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def hits_and_misses() -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        torch.compile(model, backend="spt", options=FULL)(torch.randn(3, 8)).sum().backward()
        return counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]

    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=True):
        assert [hits_and_misses(), hits_and_misses()] == [(0, 1), (1, 0)]
        monkeypatch.setattr("sptc.backend.fingerprint", lambda: "of another version")
        assert [hits_and_misses(), hits_and_misses()] == [(0, 1), (1, 0)]
