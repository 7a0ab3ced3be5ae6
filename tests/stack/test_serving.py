"""What is saved and served: plain PEFT's adapter, and a plain model, on machines that never heard of sptc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import sptc
from sptc.paper.state import ExportError
from tests.stack.loop import loop
from tests.stack.matrix import PAPER, SPARSE, Run
from tests.stack.models import batch, llama, lora
from tests.stack.results import record_verdict
from tests.stack.test_trainer import trainer

SERVE = """
import sys, warnings
sys.modules["sptc"] = None  # an import of it is an error
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(folder + "/base")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
said = [str(warning.message) for warning in said if issubclass(warning.category, UserWarning)]  # others are transformers' of itself
assert not said, said
with torch.no_grad():
    adapted = model(torch.load(folder + "/ids.pt")).logits
    merged = model.merge_and_unload()(torch.load(folder + "/ids.pt")).logits
torch.save((adapted, merged), folder + "/logits.pt")
assert not [name for name in sys.modules if name.partition(".")[0] == "sptc" and sys.modules[name] is not None]
"""


def trained(folder: Path) -> Any:
    """A model with an adapter that was trained sparse."""
    run = Run("sparse", folder, SPARSE)
    model = run.train(lora(llama()))
    run.compile_in_place(model)
    loop(run, model)
    assert not run.still()
    return model


@pytest.mark.cell("Saving and serving", "the adapter where sptc is not installed")
def test_an_adapter_is_served_without_sptc(tmp_path: Path, record_property: Any) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = trained(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    lora(llama()).save_pretrained(tmp_path / "plain")
    shapes = [
        {name: tensor.shape for name, tensor in load_file(tmp_path / folder / "adapter_model.safetensors").items()}
        for folder in ("adapter", "plain")
    ]
    assert shapes[0] == shapes[1]
    configs = [(tmp_path / folder / "adapter_config.json").read_text() for folder in ("adapter", "plain")]
    assert configs[0] == configs[1]
    ids = batch()["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    served = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert served.returncode == 0, served.stderr
    with torch.no_grad():
        want = model.eval()(ids).logits
    for got in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(got, want)
    record_verdict(record_property, "works", "the keys and the config that PEFT writes of a model that sptc never saw; no warning")


@pytest.mark.cell("Saving and serving", "checkpoints of Trainer")
def test_a_checkpoint_is_plain(tmp_path: Path, record_property: Any) -> None:
    """What Trainer saves of a model that is compiled in place has PEFT's keys and its trained weights."""
    run = Run("sparse", tmp_path, SPARSE)
    model = run.train(lora(llama()))
    run.compile_in_place(model)
    trainer(tmp_path, model, num_train_epochs=1, save_strategy="epoch").train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    served = PeftModel.from_pretrained(llama(), checkpoint).eval()
    with torch.no_grad():
        torch.testing.assert_close(served(**batch()).logits, model.eval()(**batch()).logits)
    record_verdict(record_property, "works")


@pytest.mark.cell("Saving and serving", "state_dict, save_pretrained of all weights")
def test_a_model_is_saved_without_a_trace(tmp_path: Path, record_property: Any) -> None:
    run = Run("sparse", tmp_path, SPARSE)
    model, keys = run.train(llama()), set(llama().state_dict())
    run.compile_in_place(model)
    loop(run, model)
    assert set(model.state_dict()) == keys
    twin = llama()
    twin.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert "spt" not in (tmp_path / "model" / "config.json").read_text()
    with torch.no_grad():
        want = model.eval()(**batch()).logits
        for plain in (twin, again):
            torch.testing.assert_close(plain.eval()(**batch()).logits, want)
    record_verdict(record_property, "works")


def exported(model: Any, folder: Path) -> Any:
    return torch.export.export(model, (), {"input_ids": batch()["input_ids"]}).module()


def packaged(model: Any, folder: Path) -> Any:
    program = torch.export.export(model, (), {"input_ids": batch()["input_ids"]})
    return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2")))


def to_onnx(model: Any, folder: Path) -> Any:
    program = torch.onnx.export(model, (), kwargs={"input_ids": batch()["input_ids"]}, dynamo=True, verbose=False)
    assert program is not None

    def call(input_ids: torch.Tensor) -> Any:
        (logits,) = program.call_reference(input_ids=input_ids)  # onnx's own evaluator, in numpy
        return SimpleNamespace(logits=logits)

    return call


HOW = [
    pytest.param(exported, marks=pytest.mark.cell("Saving and serving", "torch.export")),
    pytest.param(packaged, marks=(pytest.mark.cell("Saving and serving", "AOTInductor"), pytest.mark.stack)),
    pytest.param(to_onnx, marks=(pytest.mark.cell("Saving and serving", "ONNX"), pytest.mark.stack, pytest.mark.needs("onnxscript"))),
]


@pytest.mark.parametrize("export", HOW)
def test_a_trained_model_is_exported_dense(export: Any, tmp_path: Path, record_property: Any) -> None:
    model = trained(tmp_path).eval()
    program = export(model, tmp_path)
    ids = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(program(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    record_verdict(record_property, "works", "dense, as all inference is")


PREPARED = [
    pytest.param(exported, marks=pytest.mark.cell("Saving and serving", "torch.export, with trained routers")),
    pytest.param(
        to_onnx,
        marks=(
            pytest.mark.cell("Saving and serving", "ONNX, with trained routers"),
            pytest.mark.stack,
            pytest.mark.needs("onnxscript"),
        ),
    ),
]


@pytest.mark.parametrize("export", PREPARED)
def test_trained_routers_are_not_exported_away(export: Any, tmp_path: Path, record_property: Any) -> None:
    """What came out was another model, with a warning that asked for a compile."""
    model = lora(llama()).eval()
    sptc.prepare(model, batch(), PAPER)
    with pytest.raises(Exception) as caught:
        export(model, tmp_path)
    causes = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert isinstance(causes[-1], ExportError) and "sptc.detach(model)" in str(causes[-1])
    record_verdict(record_property, "an error", str(causes[-1]))
    export(sptc.detach(model), tmp_path)
