"""What the log says of a compile: once a model, at its second step, and a warning where little or nothing is sparse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.distributed import DDPOptimizer

from sptc import backend
from tests.models.compiled import without_inductor

NEVER = {"decline": "never", "ffn.density": 0.5}


class Ffn(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Layers(nn.Module):
    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(Ffn(32 + 4 * i) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for ffn in self.ffns:
            x = ffn(x)
        return x


class Pieces(Layers):
    """Six graphs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.ffns[0](x)
        torch._dynamo.graph_break()
        x = self.ffns[1](x)
        torch._dynamo.graph_break()
        x = self.ffns[2](x)
        torch._dynamo.graph_break()
        x = self.ffns[3](x)
        torch._dynamo.graph_break()
        x = self.ffns[4](x)
        torch._dynamo.graph_break()
        return self.ffns[5](x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """Returns level and text of what was said so far."""
    backend._summary.forget()
    torch._logging.warning_once.cache_clear()
    caplog.set_level(logging.INFO, "sptc")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name in ("sptc.reports.summary", "sptc.backend")]


def compiled(model: nn.Module, **options: object) -> nn.Module:
    model.compile(backend=without_inductor(**options), dynamic=False)
    return model


def rows(n: int = 5) -> Tensor:
    return torch.randn(n, 16)


def test_one_line_at_the_second_step(said):
    model = compiled(Ffn(), **NEVER)
    model(rows()).sum().backward()
    assert not said()
    for n in (5, 5, 7):
        model(rows(n)).sum().backward()
    ((level, text),) = said()
    assert level == "INFO" and "test_summary.py:" in text
    assert "Ffn.forward" in text and ": 1 of 1 regions are rewritten (ffn 1 of 1); predicted: " in text
    assert text.endswith(" s dense")


def test_another_size_is_a_second_step_and_no_other_model(said):
    model = compiled(Ffn(), **NEVER)
    for n in (5, 6, 7, 7, 5):
        model(rows(n))
    assert len(said()) == 1 and "1 of 1 regions" in said()[0][1]


def test_graphs_that_look_alike_are_told_apart(said):
    """As after a reset, when Dynamo's numbers begin anew while an earlier model still waits for its second step."""
    for _ in range(2):
        torch._dynamo.reset()
        model = compiled(Ffn(), **NEVER)
        model(rows())
    model(rows())
    assert len(said()) == 1


def test_all_graphs_of_a_step_are_one_model_and_many_are_a_warning_that_names_breaks(said):
    model = compiled(Pieces(), **NEVER)
    model(rows())
    assert not said()
    for _ in range(2):
        model(rows())
    (level, first), (worse, second) = said()
    assert (level, worse) == ("INFO", "WARNING") and "6 of 6 regions are rewritten (ffn 6 of 6)" in first
    assert "6 graphs: little of the step is in one" in second and "broken at test_summary.py:" in second and " and 2 more; " in second


@pytest.mark.parametrize("needs", [True, False])
def test_layers_that_share_code_are_no_second_step(said, needs):
    """What later layers are given needs a gradient: where the first one's input does not, their code is compiled once more."""
    model = Layers(0)
    model.ffns.extend(Ffn() for _ in range(3))
    model.ffns.append(Ffn(32))
    backend = without_inductor(**NEVER)
    for ffn in model.ffns:
        ffn.compile(backend=backend, dynamic=False)
    x = rows().requires_grad_() * 1 if needs else rows()
    model(x)
    assert not said()
    model(x)
    assert len(said()) == 1 and "2 of 2 regions" in said()[0][1]


def test_nothing_rewritten_is_a_warning_with_the_reason(said):
    model = compiled(Layers(3))
    for _ in range(3):
        model(rows())
    ((level, text),) = said()
    assert level == "WARNING" and "none of 3 regions is rewritten (ffn 0 of 3): 3 x ffn, " in text
    assert "computes no cross entropy" in text or "would not pay: " in text
    assert "sptc.report(model)" in text


def test_nothing_found_is_a_warning(said):
    model = compiled(nn.Sequential(nn.Linear(16, 16)).append(nn.Tanh()), **NEVER)
    wrapped = torch.compile(model, backend=without_inductor(**NEVER))
    for _ in range(2):
        wrapped(rows())
    ((level, text),) = said()
    assert level == "WARNING" and "no attention, FFN or loss was found in 1 graph: all is dense" in text


def test_an_operator_that_no_pass_looks_into_is_a_reason_and_no_region(said):
    compiled = torch.compile(lambda x: Doubled.apply(x).sum(), backend=without_inductor(**NEVER))
    for _ in range(2):
        compiled(rows().requires_grad_())
    ((level, text),) = said()
    assert level == "WARNING" and "was found in 1 graph (1 x graph, [higher-order] autograd_function_apply is kept as it is" in text


def test_the_reason_given_is_the_most_frequent(said):
    model = compiled(Layers(3), **{**NEVER, "exclude": ["ffns.1", "ffns.2"]})
    for _ in range(2):
        model(rows())
    assert (
        "1 of 3 regions are rewritten (ffn 1 of 3)" in said()[0][1]
        and "; dense: 2 x ffn, [exclude] option 'exclude' names it" in said()[0][1]
    )


def test_evaluation_says_nothing(said):
    model = compiled(Ffn(), **NEVER)
    with torch.no_grad():
        for _ in range(3):
            model(rows())
    assert not said()
    for _ in range(2):
        model(rows())
    assert len(said()) == 1


def test_other_ranks_say_nothing(said, monkeypatch):
    monkeypatch.setattr("sptc.reports.summary.is_first_rank", lambda: False)
    model = compiled(Ffn(), **NEVER)
    for _ in range(3):
        model(rows())
    assert not said()


def test_the_recompile_limit_is_a_warning_that_names_the_size(said):
    with torch._dynamo.config.patch(recompile_limit=3):
        model = compiled(Ffn(), **NEVER)
        for n in (5, 6):
            model(rows(n))
        assert not [text for level, text in said() if level == "WARNING"]
        for n in (7, 8, 9):
            model(rows(n))
    ((_, text),) = [entry for entry in said() if entry[0] == "WARNING"]
    assert "Ffn.forward (test_summary.py:" in text and "was compiled 3 times" in text
    assert "what changed last: tensor 'x' size mismatch at index 0. expected 5, actual 7" in text


def test_parts_that_ddp_cuts_a_graph_into_are_one_model(said):
    """They are run once with fakes as they are compiled, which is no step."""
    cutting = DDPOptimizer(bucket_bytes_cap=4096, backend_compile_fn=without_inductor(**NEVER), first_bucket_cap=4096)
    model = Layers(3)
    model.compile(backend=cutting.compile_fn, dynamic=False)
    model(rows()).sum().backward()
    assert not said()
    model(rows())
    assert len(said()) == 1 and "3 of 3 regions are rewritten" in said()[0][1]
