"""Models and batches as a benchmark trains them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sptc.benchmark.bench import bench
from sptc.benchmark.job import Job, Source
from sptc.benchmark.model import loss_of, make, trained
from sptc.benchmark.variants import BenchError, Variant
from sptc.config import ConfigError
from sptc.model.load import ModelError, load_model, load_trained
from sptc.plans.planning import plan
from sptc.reports.explain import explain

FACTORY = """
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, ids, labels=None):
        logits = self.out(self.embed(ids))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

def sized(batch, length):
    ids = torch.arange(batch * length).view(batch, length) % 11
    return Head(), {"ids": ids, "labels": ids}

def fixed():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)

def frozen():
    return nn.Linear(4, 4).requires_grad_(False), torch.randn(3, 4)

def function():
    return torch.sin, torch.randn(3)
"""
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "factory_of_bench_tests.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield "factory_of_bench_tests"
    sys.modules.pop("factory_of_bench_tests", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import transformers

    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, max_position_embeddings=64))
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, max_position_embeddings=64, num_labels=3))
    made = {}
    for name, model in (("llama", llama), ("bert", bert)):
        made[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(made[name])
    return made


def job(name: str, **changes) -> Job:
    plain = Job(Source(name), Variant("eager", "eager"), 2, 24, "fp32", "cpu", 0, 1.0, False, None, "")
    return replace(plain, **changes)


def test_labels_of_a_language_model_are_its_tokens_and_the_last_count(folders):
    model, args, kwargs, notes = make(job(folders["llama"], counted=0.25))
    assert not args and model.training and kwargs["labels"].shape == (2, 24)
    assert torch.equal(kwargs["labels"][:, 18:], kwargs["input_ids"][:, 18:]) and (kwargs["labels"][:, :18] == -100).all()
    assert any("no tokenizer" in note for note in notes) and not any("no weights" in note for note in notes)
    assert loss_of(model(**kwargs)).requires_grad


def test_labels_of_a_classifier_are_classes(folders):
    model, _, kwargs, notes = make(job(folders["bert"]))
    assert kwargs["labels"].tolist() == [0, 1]
    assert "hidden_dropout_prob is 0 here, not 0.1" in notes and not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
    with pytest.raises(BenchError, match="label for each token"):
        make(job(folders["bert"], counted=0.5))


def test_a_folder_without_weights_is_noted(folders, tmp_path):
    (tmp_path / "config.json").write_text(Path(folders["llama"], "config.json").read_text())
    model, _, notes = load_trained(str(tmp_path), 1, 8)
    assert any("has no weights here" in note for note in notes) and isinstance(model, nn.Module)


def test_adapters_are_on_every_linear_layer_and_have_gradients(folders):
    model, _, kwargs, _ = make(job(folders["llama"], lora=4))
    again, *_ = make(job(folders["llama"], lora=4))
    names = dict(trained(model))
    assert len(names) == 14 and all("lora_" in name for name in names), "seven projections, two factors each"
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(trained(model), trained(again), strict=True)), "the same in every process"
    loss_of(model(**kwargs)).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in names.values())


def test_adapters_of_a_model_that_is_not_of_transformers(factory):
    model, *_ = make(job(f"{factory}:fixed", lora=2))
    assert sorted(name.split(".")[-2] for name, _ in trained(model)) == ["default", "default"]


def test_checkpointing_is_turned_on_or_refused(folders, factory):
    model, *_ = make(job(folders["llama"], lora=4, checkpointing=True))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with pytest.raises(BenchError, match="Sequential has no gradient_checkpointing_enable"):
        make(job(f"{factory}:fixed", checkpointing=True))


def test_the_reference_is_the_same_model_in_fp64(folders):
    model, _, kwargs, _ = make(job(folders["llama"], lora=4))
    wide, _, inputs, _ = make(job(folders["llama"], lora=4), reference=True)
    assert all(p.dtype == torch.float64 for p in wide.parameters())
    assert float(loss_of(wide(**inputs))) == pytest.approx(float(loss_of(model(**kwargs))), rel=1e-5)


def test_weights_in_16_bits_have_adapters_in_fp32_and_their_reference_is_of_the_same_numbers(folders):
    model, _, kwargs, _ = make(job(folders["llama"], lora=4, dtype="bf16-weights"))
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}, "as PEFT has them"
    wide, _, inputs, _ = make(job(folders["llama"], lora=4, dtype="bf16-weights"), reference=True)
    for (name, p), (_, q) in zip(model.named_parameters(), wide.named_parameters(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(p.float(), q), name
    assert float(loss_of(wide(**inputs))) == pytest.approx(float(loss_of(model(**kwargs))), rel=1e-2)
    whole, *_ = make(job(folders["llama"], dtype="bf16-weights"))
    assert all(p.dtype == torch.bfloat16 for p in whole.parameters())


def test_a_plan_of_the_bare_model_holds_with_adapters(folders, tmp_path):
    bare, inputs = load_model(folders["llama"], 2, 24)
    path = str(tmp_path / "plan.json")
    plan(bare, inputs, max_error=1.0, options={"decline": "never"}).save(path)
    model, _, kwargs, _ = make(job(folders["llama"], lora=4))
    assert [r.kind for r in explain(model, kwargs, {"plan": path}).regions if r.status != "refused"] == ["attention", "ffn"]
    wrapped = get_peft_model(load_model(folders["llama"], 2, 24)[0], LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="plan"):
        explain(wrapped, kwargs, {"plan": path})


def test_a_factory_is_told_the_sizes_that_it_asks_for(factory):
    model, _, kwargs, _ = make(job(f"{factory}:sized", counted=0.5))
    assert kwargs["labels"].shape == (2, 24) and (kwargs["labels"] == -100).sum() == 24
    assert loss_of(model(**kwargs)).requires_grad
    _, args, _, _ = make(job(f"{factory}:fixed"))
    assert args[0].shape == (3, 4)


def test_a_model_at_hand_is_the_same_in_another_process(tmp_path):
    model, x = nn.Linear(4, 4).double(), torch.randn(3, 4).double()
    source = Source.saved(model, x, tmp_path)
    loaded, (given,), _, _ = make(job("", source=source, dtype=None))
    assert torch.equal(loaded.weight, model.weight) and torch.equal(given, x) and loaded.weight.dtype == torch.float64
    with pytest.raises(BenchError, match=r"'package\.module:factory'"):
        Source.saved(nn.Sequential(type("Local", (nn.Module,), {})()), x, tmp_path)


def test_the_loss_is_found_or_made():
    x = torch.ones(3, requires_grad=True)
    assert loss_of({"loss": x.sum(), "logits": x}).item() == 3
    assert loss_of((x, x.sum())).item() == 3, "the only number"
    assert loss_of({"hidden": 2 * x}).item() == 4, "the mean square"
    with pytest.raises(BenchError, match="no tensor that requires a gradient"):
        loss_of(torch.ones(3))


@pytest.mark.parametrize(
    "name, settings, error, says",
    [
        ("no_such_module:f", {}, ModelError, "no module 'no_such_module'"),
        ("./no/such/folder", {}, ModelError, "no model"),
        ("{factory}:nothing", {}, ModelError, "has no 'nothing'"),
        ("{factory}:function", {}, BenchError, "trains a torch.nn.Module"),
        ("{factory}:frozen", {}, BenchError, "nothing in the model requires a gradient"),
        ("{factory}:fixed", {"lengths": [64]}, BenchError, "makes a batch of its own size"),
        ("{llama}", {"lengths": [32, 65]}, ModelError, "more than the 64 positions"),
        ("{llama}", {"device": "cuda"}, BenchError, "sees no GPU"),
        ("{llama}", {"device": "meta"}, ConfigError, "no kernels for device 'meta'"),
        ("{llama}", {"device": "gpu"}, BenchError, "there is no device 'gpu'"),
        ("{llama}", {"dtype": "fp16"}, BenchError, "must be one of fp32, bf16, bf16-weights"),
        ("{llama}", {"counted": 0.0}, BenchError, "must be a share"),
        ("{llama}", {"steps": 0}, BenchError, "steps must be at least 1"),
        ("{llama}", {"sequences": 0}, BenchError, "sequences must be at least 1"),
        ("{llama}", {"lengths": [64, 0]}, BenchError, "lengths must be at least 1"),
        ("{llama}", {"lora": -1}, BenchError, "lora must be a rank"),
        ("{llama}", {"variants": {"half": {"ffn.densty": 0.5}}}, ConfigError, "did you mean"),
        ("{llama}", {"only": ["inducter"]}, BenchError, "did you mean 'inductor'"),
        ("{llama}", {"batch": torch.ones(2)}, BenchError, "makes its own batch"),
        (nn.Linear(3, 3), {}, BenchError, "needs a batch of yours"),
    ],
)
def test_mistakes_are_errors_before_any_process_starts(factory, folders, monkeypatch, name, settings, error, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sptc.benchmark.bench.run", None)
    monkeypatch.setattr("sptc.benchmark.child.process.Worker", None)
    model = name.format(factory=factory, **folders) if isinstance(name, str) else name
    with pytest.raises(error, match=says):
        bench(model, **settings)


def test_what_is_run_without_being_asked(factory, folders, monkeypatch):
    monkeypatch.setattr("sptc.benchmark.bench.run", lambda source, settings, progress: settings)
    fixed, sized = bench(f"{factory}:fixed"), bench(f"{factory}:sized")
    language = bench(folders["llama"], lengths=[32, 64], sequences=3)
    assert fixed.lengths == (None,) and sized.lengths == (512,) and language.lengths == (32, 64) and language.batch == 3
    assert (fixed.lora, sized.lora, language.lora) == (0, 0, 16), "a factory's model is taken as it is"
    given = bench(nn.Linear(4, 4).double(), torch.randn(2, 4).double(), variants={"half": {"ffn.density": 0.5}})
    assert given.dtype is None and given.lengths == (None,) and given.variants[-1].name == "half" and fixed.dtype == "fp32"


def test_adapters_without_peft_are_an_error(factory, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match="lora needs PEFT"):
        bench(f"{factory}:fixed", lora=4)
