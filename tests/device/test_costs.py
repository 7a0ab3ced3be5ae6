import json
import os
import stat

import pytest
import torch

import sptc.codegen.ops  # noqa: F401
from sptc.config import ConfigError
from sptc.device import costs as device
from sptc.device import measure

CPU = torch.device("cpu")


def blocks(n: int, m: int, density: float, own: bool) -> tuple[int, int]:
    return 64, 32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, measurements that take no time, and how many were made."""
    values = {name: float(i + 1) for i, name in enumerate(sorted(device._NUMBERS))}
    rates = {"gemm": 7.0, "attention": 8.0, "attention_backward": 9.0, "row_seconds": 0.5}
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device, "measure", lambda _: made.append(1) or {**values, "single": dict(rates), "half": dict(rates)})
    device._constants.cache_clear()
    yield made
    device._constants.cache_clear()


def calibrated() -> device.DeviceCosts:
    return device.calibrate(CPU, blocks)


def only_file():
    (path,) = device.cache_folder().iterdir()
    return path


def test_measured_once_and_read_by_the_next_process(cache):
    first = calibrated()
    device._constants.cache_clear()
    assert calibrated() == first and len(cache) == 1
    assert stat.S_IMODE(device.cache_folder().stat().st_mode) == 0o700
    assert first.default_blocks(1, 1, 0.5, False) == (64, 32)


def test_rates_grow_with_threads_and_overheads_do_not(cache):
    values = device.measure(CPU)
    one, four = (device._costs(values, threads, blocks) for threads in (1, 4))
    assert four.single.gemm == 4 * one.single.gemm and four.half.attention == 4 * one.half.attention
    assert four.bandwidth == 4 * one.bandwidth and four.sparse_attention == 4 * one.sparse_attention
    assert (four.op_seconds, four.attention_seconds) == (one.op_seconds, one.attention_seconds)
    assert four.half.row_seconds == one.half.row_seconds / 4 > 0
    assert four.bf16_gain == one.bf16_gain == values["bf16_gain"]


def test_a_gpu_is_measured_anew_for_other_products_in_fp32(monkeypatch):
    """TF32 makes dense fp32 products several times as fast, so constants measured without it decide wrongly."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    gpu, matmul = torch.device("cuda"), torch.backends.cuda.matmul
    before, exact, cpu = matmul.fp32_precision, device._key(gpu), device._key(CPU)
    try:
        matmul.fp32_precision = "tf32"
        assert device._key(gpu) != exact and device._key(CPU) == cpu
    finally:
        matmul.fp32_precision = before


def test_a_processor_is_measured_anew_where_onednn_computes_fp32_products():
    before, usual = torch.get_float32_matmul_precision(), device._key(CPU)
    torch.set_float32_matmul_precision("medium")
    try:
        assert device._key(CPU) != usual
    finally:
        torch.set_float32_matmul_precision(before)
    assert device._key(CPU) == usual


@pytest.mark.parametrize("damage", ["", "{", "[]", "missing", "negative", "text", "rate"])
def test_a_damaged_file_is_measured_anew(cache, damage):
    first = calibrated()
    path = only_file()
    values = json.loads(path.read_text())
    if damage == "missing":
        del values["bandwidth"]
    elif damage == "negative":
        values["bandwidth"] = -1.0
    elif damage == "text":
        values["bandwidth"] = "fast"
    elif damage == "rate":
        values["half"]["gemm"] = None
    path.write_text(json.dumps(values) if damage.isalpha() else damage)
    device._constants.cache_clear()
    assert calibrated() == first and len(cache) == 2
    assert path == only_file() and json.loads(path.read_text())["bandwidth"] == first.bandwidth / torch.get_num_threads()


def test_a_place_that_cannot_be_written_costs_only_time(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    calibrated()
    assert "cannot keep" in caplog.text


def test_measuring_leaves_the_callers_state_alone():
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad(), torch.autocast("cpu"), torch.device("meta"):
        values = device.measure(CPU)
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    assert values.keys() > device._NUMBERS
    assert all(0 < values[name] < float("inf") for name in device._NUMBERS)
    assert values["half"]["gemm"] > 0 and values["op_seconds"] < values["attention_seconds"]


def test_the_interpreter_is_not_measured(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(measure, "_Bench", _Told())
    with pytest.raises(InterruptedError, match="TRITON_INTERPRET is None"):
        device.measure(CPU)
    assert os.environ["TRITON_INTERPRET"] == "1"


class _Told:
    def of(self, _):
        raise InterruptedError(f"TRITON_INTERPRET is {os.environ.get('TRITON_INTERPRET')}")


def test_other_devices_are_refused_by_name():
    device.check_device(CPU)
    device.check_device(torch.device("cuda:1"))
    with pytest.raises(ConfigError, match="no kernels for device 'xpu:1'"):
        device.check_device(torch.device("xpu:1"))
