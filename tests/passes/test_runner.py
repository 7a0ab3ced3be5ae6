"""What the runner logs of each pass, and passes that are left out."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import sptc
from tests.models.compiled import without_inductor

NEVER = {"decline": "never", "ffn.density": 0.5}


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_a_line_a_pass_with_the_operators_that_it_changed(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Ffn(), torch.randn(5, 16)
    with caplog.at_level(logging.DEBUG, "sptc"):
        torch.compile(model, backend=without_inductor(**NEVER))(x)
    lines = dict(r.getMessage().split(": ", 1) for r in caplog.records if r.name == "sptc.passes.runner")
    assert list(lines) == ["lower", "find", "bind", "decide", "weigh", "rewrite"]
    assert "linear 2 -> 0" in lines["lower"] and "aten.linear 0 -> 2" in lines["lower"]
    assert lines["decide"].endswith("graph as it was")
    assert "sptc.choose_units 0 -> 1" in lines["rewrite"] and "aten.index_select 0 -> " in lines["rewrite"]


@pytest.mark.parametrize(("name", "regions"), [("lower", 0), ("find", 0), ("bind", 1), ("decide", 0), ("rewrite", 1)])
def test_a_pass_that_is_disabled_does_not_run(name: str, regions: int) -> None:
    model, x = Ffn(), torch.randn(5, 16)
    compiled = torch.compile(model, backend=without_inductor(**NEVER, disable=[name]))
    dense = bool((compiled(x) == model(x)).all())
    report = sptc.report(compiled)
    assert dense is (name != "bind") and len(report.regions) == regions
    assert all((r.status == "rewritten") is not dense for r in report.regions)
    assert name not in [ran for ran, _ in report.passes] and f"option 'disable': without {name}" in report.notes


def test_a_pass_that_there_is_not_is_an_error() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"option 'disable': there is no pass 'rewrites' .* known: lower, find, "):
        torch.compile(Ffn(), backend=without_inductor(disable=["rewrites"]))(torch.randn(5, 16))
