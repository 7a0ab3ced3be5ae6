"""`make gpu` where there is no GPU: its dry run, and that nothing that goes wrong in a run costs more than the row in work."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

import sptc
from bench.ffn import Ffn, Layer, routed
from bench.gpu import __main__ as command
from bench.gpu import flex, layers, stages, training
from bench.gpu.journal import Journal
from bench.gpu.sizes import DRY, FULL
from bench.gpu.stage import Limit, OutOfTime
from bench.gpu.summary import LONGEST, summary
from bench.gpu.timing import timed
from bench.kernels import ahead, steps
from bench.kernels.cases import attention_operands
from sptc.codegen.triton.target import KNOWN

CPU = torch.device("cpu")


def start(folder, *arguments):
    environment = {**os.environ, "OUT": str(folder), "GPU_DRY": "1", "PYTHONPATH": str(command.ROOT)}
    call = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.Popen(call, cwd=command.ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def rows(folder):
    """Every line must be JSON."""
    path = folder / "gpu_dry.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def run(request, tmp_path):
    """A run of stages that go wrong, the last of them endless."""
    stages = [argument for name in request.param for argument in ("--stage", name)]
    process = start(tmp_path, "--stages", "tests.bench.gpu_stages", *stages)
    yield process
    process.kill()
    process.stdout.close()


@pytest.mark.parametrize("run", [("start", "warm", "correct")], indirect=True, ids=[""])
def test_a_run_survives_what_goes_wrong(run, tmp_path):
    """A case that raises, dies, overruns, hangs or finds something wrong is a row, and the others run; a kill leaves whole lines."""
    wait_for(lambda: sum(row["case"] == "endless 0" for row in rows(tmp_path)) > 3)
    ends = {row["case"]: row for row in rows(tmp_path) if "status" in row}
    assert {name: row["status"] for name, row in ends.items()} == {
        "fine": "ok", "raises": "failed", "dies": "died", "goes_on": "stopped", "hangs": "died", "wrong": "ok", "late": "not run",
    }  # fmt: skip
    assert ends["raises"]["error"] == "RuntimeError: no such kernel" and "in raises" in ends["raises"]["trace"]
    assert ends["dies"]["error"] == "exit code -9" and "in hangs" in ends["hangs"]["trace"]
    assert ends["goes_on"]["seconds"] < 1.5
    found = Counter(row["case"] for row in rows(tmp_path) if "found" in row)
    assert (found["fine"], found["raises"], found["dies"], found["hangs"]) == (2, 1, 1, 1) and found["goes_on"] > 3

    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    before = len(rows(tmp_path))
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert len(rows(tmp_path)) >= before and children and not any(map(alive, children))
    end = text[text.index("= summary") :]
    assert "WRONG start: wrong: q 1 > 0.1" in end and "FAILED start: raises: RuntimeError: no such kernel" in end
    assert "DIED start: hangs" in end and "NOT RUN warm: late" in end and "found=2" in text


@pytest.mark.parametrize("run", [("correct",)], indirect=True, ids=[""])
def test_killing_the_run_ends_its_processes_and_leaves_whole_lines(run, tmp_path):
    wait_for(lambda: len(rows(tmp_path)) > 3)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    run.kill()
    wait_for(lambda: not any(map(alive, children)), 15)
    known = rows(tmp_path)
    assert children and len(known) > 3
    with (tmp_path / "gpu_dry.jsonl").open("a") as file:
        file.write('{"run": "cut o')
    journal = Journal(tmp_path / "gpu_dry.jsonl", known[0]["run"], time.monotonic())
    journal.write("start", "another", {"found": 1.0})
    assert [row["case"] for row in journal.rows()] == [row["case"] for row in known] + ["another"]


def test_rounds_stop_when_the_time_of_a_case_is_over():
    limit, many, calls = Limit(0.3), replace(DRY, rounds=10**6), []
    times = timed({"a": lambda: calls.append(time.sleep(0.01)), "b": lambda: None}, many, limit)
    assert times["a"].ms >= 10 and 5 < len(calls) < 40 and limit.over()
    with pytest.raises(OutOfTime):
        timed({"a": lambda: None}, many, limit)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def dry(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl", "run", time.monotonic())
    journal.write("start", "rates", {"product_rate": 1e12, "copy_rate": 1e12})
    return {stage.name: stage for stage in stages.stages(True, journal)}, journal


def test_stages_are_those_of_the_command(dry):
    full = stages.stages(False, dry[1])
    assert [stage.name for stage in full] == list(dry[0]) == list(command.NAMES)
    names = [(stage.name, case.name) for stage in full for case in stage.cases]
    assert len(set(names)) == len(names), "a case goes by its name"


FAST = {"start": (0, 1, 2), "warm": (0,), "correct": (0, 1), "kernels": (0,), "layers": (1, -4), "tuning": (0,), "flex": (0,)}


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in FAST.items() for case in cases])
def test_a_stage_of_the_dry_run(name, case, dry, monkeypatch):
    """Those that take seconds; `GPU_DRY=1 make gpu` does all of them."""
    monkeypatch.setenv("TRITON_INTERPRET", str(int(dry[0][name].interpreted)))
    found = list(dry[0][name].cases[case].rows(Limit(100.0)))
    assert found and not any(row.get("wrong") for row in found)
    if name in ("warm", "tuning"):
        assert found[-1]["compiled"] == found[-1]["of"] == DRY.kernels
    if name == "correct":
        assert found[0]["tensors"] == (3 if dry[0][name].cases[case].name.startswith("products") else 6)
    if name == "kernels":
        *single, whole = found
        assert len(single) == whole["launches"] and sum(row["ms"] for row in single) == pytest.approx(whole["kernels_ms"])
        assert all(0 < row["floor_share"] == row["floor_ms"] / row["ms"] for row in single)
        products = {"pooled_logsumexp", "pooled_scores", "attention_forward", "attention_backward_q", "attention_backward_kv"}
        assert {row["kernel"] for row in single if row["operations"]} == products
    if name == "layers":
        assert found[0]["both_ms"] > 0


def test_a_step_of_the_dry_run(dry, interpreted):
    way = training.Way("spt never", {**training.NEVER, **training.CONTEXT})
    first, timed = training.step(32, way, DRY, Limit(200.0))
    assert first["rewritten"] == 2 and timed["loss_after"] < first["loss"] == pytest.approx(math.log(32), rel=0.05)


def test_shapes_are_the_products(dry):
    """One attention case must be what a prepared LLaMA launches: the kernels that are timed are those that a step runs."""
    case = FULL.attention[0]
    assert case.selector == "pooled" and (case.heads, case.kv_heads, case.size) == (32, 8, 128) and case.length == 8192
    assert all((c.blocks, c.lora, c.trained) == (16, 16, True) for c in FULL.ffn.values())
    reached = {launch.spec.template for case in FULL.checks for launch in ahead.launches(case, KNOWN["sm_90"])}
    assert reached == ahead.templates(), "the cases of the run reach every kernel that there is"


@pytest.mark.parametrize("form", layers.FFN)
def test_forms_of_the_ffn_compile_whole(form):
    layer, x = Ffn(DRY.ffn["ReLU"]), torch.randn(64, 32)
    assert torch.compile(layers.FFN[form](layer), backend="aot_eager", fullgraph=True)(x).shape == x.shape


@pytest.mark.parametrize("trained", [False, True])
def test_the_routed_ffn_is_rewritten(trained):
    layer, x = Layer(replace(DRY.ffn["ReLU"], trained=trained)), torch.randn(64, 32, requires_grad=True)
    run = routed(layer, x.detach(), aot_eager)
    run(x).sum().backward()
    [region] = sptc.report(run).regions
    assert (region.status, region.density, hasattr(layer.ffn, "spt")) == ("rewritten", 0.5, trained)


def test_units_at_density_one_are_the_dense_ffn():
    layer, x = Ffn(DRY.ffn["ReLU"]), torch.randn(64, 32)
    torch.testing.assert_close(layer.units(x, 1.0), layer.dense(x))
    torch.testing.assert_close(layer.counted(x, 0.5, 1.0), layer.dense(x))
    half = layer.units(x, 0.5)
    least = layer._hidden(x[::16]).square().mean(0) * layer.down.weight.square().sum(0)
    kept = least.argsort(descending=True)[:32]
    hidden = layer._hidden(x).index_fill(1, least.argsort()[:32], 0.0)
    torch.testing.assert_close(half, layer.down(hidden) + layer.down_adapter.b.mm(layer.down_adapter.a.mm(hidden.t())).t())
    assert len(kept) == 32 and not torch.allclose(half, layer.dense(x))


def test_flex_attention_gets_the_same_lists():
    case = replace(DRY.attention[0], length=96, kv_heads=2, density=0.7)
    o = attention_operands(case, CPU, torch.float32)
    ids, counts, *_ = steps.select(case, o)
    mask = flex.block_mask(case, ids, counts)
    seen = mask.to_dense().repeat_interleave(case.query_block, 2).repeat_interleave(case.key_block, 3).bool()
    causal = torch.ones(case.length, case.length, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(o.q, o.k, o.v, attn_mask=seen & causal, scale=case.scale)
    torch.testing.assert_close(out, steps.attend(case, o, ids, counts)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(mask.kv_num_blocks + mask.full_kv_num_blocks, counts)
    whole = mask.full_kv_indices[0, 0, -1, : int(mask.full_kv_num_blocks[0, 0, -1])]
    assert len(whole) and (whole + 1).max() * case.key_block <= case.length - case.query_block + 1


def test_the_summary_fits_and_says_the_worst_first():
    some = [{"stage": "correct", "case": f"case {i}", "tensors": 2, "wrong": []} for i in range(50)]
    some += [{"stage": "layers", "case": f"layer {i}: dense", "both_ms": 2.0, "host_ms": 1.0, "peak_mib": 1.0} for i in range(300)]
    some += [{"stage": "training", "case": f"n=8: {name}", "step_ms": ms, "host_ms": 1.0, "peak_mib": 2.0} for name, ms in
             (("Inductor", 3.0), ("spt never", 2.0))]  # fmt: skip
    some += [{"stage": "correct", "case": "last", "tensors": 2, "wrong": ["q 2 > 1"]}]
    text = summary(some)
    assert len(text) < LONGEST + 100 and "lines left out" in text
    lines = text.splitlines()
    assert lines[1].startswith("102 tensors compared, 1 rows with wrong ones") and lines[2] == "  WRONG correct: last: q 2 > 1"
    assert next(line for line in lines if "spt never" in line).split()[4] == "1.5"


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(command, "device_name", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.delenv("GPU_DRY", raising=False)
    assert command.main() == 2 and "nvidia-smi names none" in capsys.readouterr().err
