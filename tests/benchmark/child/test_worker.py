"""What a process does when told to, and what becomes of one that fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from sptc.benchmark.child.process import Worker, WorkerFailed
from sptc.benchmark.child.training import Gradients, Training, _kind
from sptc.benchmark.child.worker import Check, Runner, compared, error_of
from sptc.benchmark.job import Job, Source
from sptc.benchmark.outcome import Case, Outcome
from sptc.benchmark.run import Settings, _take_turns
from sptc.benchmark.show.progress import Progress
from sptc.benchmark.variants import Variant


class Counter:
    """Served by a process."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError("less than nothing\nand more")
        self.value = start

    def up(self, times: int) -> Iterator[int]:
        for _ in range(times):
            self.value += 1
            yield self.value

    def fail(self) -> Iterator[int]:
        yield self.value
        raise KeyError("gone")

    def die(self) -> Iterator[int]:
        print("the last words", flush=True)
        os._exit(3)
        yield 0


def test_a_process_answers_until_it_is_told_to_end_and_failures_are_reasons(tmp_path):
    with Worker("counter", Counter, 5) as worker:
        assert list(worker.ask("up", 2)) == [6, 7] and worker.one("up", 1) == 8
        answers = worker.ask("fail")
        assert next(answers) == 8
        with pytest.raises(WorkerFailed, match="KeyError: 'gone'") as failed:
            next(answers)
        assert "Traceback" in failed.value.trace
    log = tmp_path / "log"
    with Worker("counter", Counter, 5, log=log) as worker, pytest.raises(WorkerFailed, match="ended with exit code 3") as failed:
        worker.one("die")
    assert failed.value.trace == "the last words"
    with pytest.raises(WorkerFailed, match=r"^ValueError: less than nothing$"):
        Worker("counter", Counter, -1)


@pytest.fixture
def job(tmp_path, monkeypatch) -> Iterator[Job]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ["TORCHINDUCTOR_CACHE_DIR"])  # set back when the test ends
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ["TRITON_CACHE_DIR"])
    precision = torch.get_float32_matmul_precision()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    source = Source.saved(model, torch.randn(16, 8), tmp_path)
    yield Job(source, Variant("eager", "eager"), 1, 1, None, "cpu", 0, 1.0, False, None, str(tmp_path))
    torch.set_float32_matmul_precision(precision)


def one(answers):
    (answer,) = answers
    return answer


def test_a_check_compares_with_the_reference(job, tmp_path):
    path = str(tmp_path / "reference.pt")
    one(Runner(job, reference=True).reference(path))
    check = one(Runner(job).check(path))
    assert check.passed and check.error < 1e-6 and check.cosine == pytest.approx(1.0) and (check.moved, check.trained) == (4, 4)
    assert check.reference_loss == pytest.approx(check.loss, rel=1e-5) and check.reference_norm == pytest.approx(check.norm, rel=1e-5)
    without = one(Runner(job).check(None))
    assert without.passed is None and without.error is None and without.loss == check.loss


def test_a_wrong_gradient_fails_the_check(job, tmp_path):
    path = str(tmp_path / "reference.pt")
    one(Runner(job, reference=True).reference(path))
    loss, by_name, random = torch.load(path)
    by_name["2.bias"] *= 1.002
    torch.save((loss, by_name, random), path)
    runner = Runner(job)
    found = runner.training.gradients()
    peer = replace(found, by_name={**found.by_name, "2.bias": by_name["2.bias"].float()})
    check = compared(Check(0, 0, 0, 0, 0), found, Gradients(loss, by_name), peer)
    assert check.error == pytest.approx(2e-3, rel=0.1) == check.norm_error and check.passed is False


def test_one_number_off_is_no_failure_where_a_relu_may_have_rounded_to_the_other_side():
    reference = Gradients(0.0, {"a": torch.ones(100, 100)})
    off = torch.ones(100, 100)
    off[3, 4] = 1.02
    check = compared(Check(0, 0, 0, 0, 0), Gradients(0.0, {"a": off}), reference, reference)
    assert check.error == pytest.approx(0.02, rel=1e-3) and check.norm_error == pytest.approx(2e-4, rel=1e-3) and check.passed


def test_errors_are_relative_to_the_parameter_but_not_to_one_without_gradients():
    reference = Gradients(0.0, {"a": torch.tensor([100.0]), "b": torch.tensor([1e-9])})
    assert error_of(Gradients(0.0, {"a": torch.tensor([100.1]), "b": torch.tensor([1e-9])}), reference) == pytest.approx(1e-3, rel=1e-3)
    assert error_of(Gradients(0.0, {"a": torch.tensor([100.0]), "b": torch.tensor([3e-9])}), reference) < 1e-8
    assert error_of(Gradients(0.0, {"a": torch.tensor([100.0])}), reference) == float("inf")
    assert error_of(Gradients(0.0, {"a": torch.tensor([100.0]), "b": torch.tensor([float("nan")])}), reference) == float("inf")


def test_dropout_is_no_failure(tmp_path, job):
    source = Source.saved(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), torch.randn(16, 8), tmp_path)
    job, path = replace(job, source=source), str(tmp_path / "reference.pt")
    one(Runner(job, reference=True).reference(path))
    check = one(Runner(job).check(path))
    assert check.passed is None and "draws random numbers" in check.left_out


def test_figures_of_a_step(job):
    runner = Runner(job)
    first, usual = one(runner.start())
    assert first >= 0 and usual > 0
    steps = one(runner.steps(3))
    assert len(steps) == 3 and all(wall > 0 and processor >= 0 for wall, processor in steps)
    memory = one(runner.memory())
    assert memory is None or (memory[0] > 50 and memory[1] >= 0)
    assert one(runner.tensors()) > 0
    kinds = one(runner.kinds())
    assert (
        set(kinds) == {"attention", "products", "choosing", "rest"} and kinds["products"] > 0 and sum(kinds.values()) == pytest.approx(1.0)
    )
    assert one(runner.report()) is None


def test_a_step_takes_the_memory_that_it_needs(tmp_path, job):
    """64 MiB of activations show in the peak, and not in what rests."""
    source = Source.saved(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 64)), torch.randn(1 << 18, 8), tmp_path)
    runner = Runner(replace(job, source=source))
    memory, tensors = one(runner.memory()), one(runner.tensors())
    assert 64 < tensors < 1000
    if memory is None:
        pytest.skip("this system does not tell")
    assert 64 < memory[1] < 1000


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::addmm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("sptc::sparse_attention_backward", "attention"),
        ("sptc::select_blocks", "choosing"),
        ("aten::add", None),
    ],
)
def test_kinds_of_operators(name, kind):
    assert _kind(name) == kind


class Timed:
    """A worker whose steps take known seconds."""

    def __init__(self, name: str, log: list[str], fails: bool = False) -> None:
        self.name, self.log, self.fails = name, log, fails

    def one(self, method: str, count: int) -> list[tuple[float, float]]:
        if self.fails:
            raise WorkerFailed("it broke", "trace")
        self.log.append(self.name)
        return [(0.01, 0.01)] * count


def test_turns_go_forth_and_back_and_a_failure_leaves_the_others():
    log: list[str] = []
    outcomes = [Outcome(Variant(name, "eager")) for name in "abc"]
    workers = [(outcome, Timed(outcome.variant.name, log, outcome.variant.name == "b")) for outcome in outcomes]
    settings = Settings([o.variant for o in outcomes], steps=4)
    _take_turns(workers, 1.0, settings, Case(1, 1, outcomes), Progress(False))
    assert log == ["a", "c", "c", "a", "a", "c", "c", "a"]
    assert outcomes[1].failed == "it broke" and outcomes[1].trace == "trace" and not outcomes[1].timed
    assert [len(o.turns) for o in outcomes] == [4, 0, 4]


def test_short_steps_run_several_a_turn_and_time_ends_turns():
    log: list[str] = []
    outcome = Outcome(Variant("a", "eager"))
    workers = [(outcome, Timed("a", log))]
    _take_turns(workers, 0.01, Settings([outcome.variant], steps=20), Case(1, 1, [outcome]), Progress(False))
    assert [len(turn) for turn in outcome.turns] == [4] * 5
    outcome.turns.clear()
    _take_turns(workers, 1.0, Settings([outcome.variant], steps=20, seconds=0.0), Case(1, 1, [outcome]), Progress(False))
    assert len(outcome.turns) == 3, "as few as give quartiles"


def test_progress_is_lines_in_a_log_and_nothing_where_it_is_not_wanted(capsys):
    for shown, want in ((True, "compiling\n"), (False, "")):
        progress = Progress(shown)
        progress.begin(2)
        progress.say("compiling")
        progress.say("turn 1 of 9", often=True)
        progress.advance(2)
        progress.end()
        captured = capsys.readouterr()
        assert captured.err == want and captured.out == ""


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def test_a_variant_is_prepared_before_it_is_compiled(job, tmp_path):
    """With the options that it is compiled with: what trains besides the model's own is there before the first step."""
    job = replace(job, source=Source.saved(nn.Sequential(Ffn()), torch.randn(16, 8), tmp_path))
    routed = {"ffn.selector": "router", "ffn.density": 0.5, "decline": "never"}
    prepared = replace(job, variant=Variant("routed", "spt", routed, prepares=True))
    plain = set(Training(job).model.state_dict())
    assert set(Training(prepared).model.state_dict()) > plain
    assert set(Training(prepared, reference=True).model.state_dict()) == plain
