"""The command line, called as a function."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from sptc.cli import main, parse_options
from sptc.config import ConfigError

FACTORY = """
import torch
from torch import nn

def ffn():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), torch.randn(4, 16)

def only_a_model():
    return nn.Linear(3, 3)

def three():
    return 1, 2, 3

number = 3
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "factory_of_tests.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield "factory_of_tests"
    sys.modules.pop("factory_of_tests", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders as save_pretrained writes them: a classifier and a language model."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=64))
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, max_position_embeddings=64))
    made = {}
    for name, model in (("llama", llama), ("bert", bert)):
        made[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(made[name])
    return made


def test_explain_a_factory(factory, capsys):
    assert main(["explain", f"{factory}:ffn", "--option", "decline=never", "--option", "ffn.density=0.5", "--json"]) == 0
    (region,) = json.loads(capsys.readouterr().out)["regions"]
    assert region["status"] == "rewritten"
    common = {"context": None, "gradients_only": False, "rows": "all", "recompute": False, "chunk": None, "rank": 0}
    assert region["settings"] == {"hidden": 64, "units": 32, **common}


@pytest.mark.parametrize("name, kinds", [("llama", ["attention", "ffn"]), ("bert", ["attention", "ffn", "ffn"])])
def test_explain_a_saved_model(folders, capsys, name, kinds):
    def flops(*arguments: str) -> list[float]:
        assert main(["explain", folders[name], "--length", "24", "--json", *arguments]) == 0
        regions = [r for r in json.loads(capsys.readouterr().out)["regions"] if r["kind"] != "loss"]
        assert [r["kind"] for r in regions] == kinds
        assert [r["rule"] for r in regions if r["rule"]] == ["head"] * (name == "bert")  # the pooler and the classifier
        return [r["flops_before"] for r in regions if not r["rule"]]

    training, inference, batch = flops(), flops("--inference"), flops("--batch", "3")
    assert all(t > 2 * i for i, t in zip(inference, training, strict=True))
    assert [b / t for t, b in zip(training, batch, strict=True)] == [3.0, 3.0]


OPTIONS = ["--option", "decline=never", "--option", "attention.density=0.5", "--option", "ffn.density=0.5"]


def test_dump_writes_the_rewritten_graph_without_compiling(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sptc.backend.compile_fx", None)
    assert main(["dump", folders["llama"], "--out", str(tmp_path / "out"), "--length", "8", *OPTIONS]) == 0
    assert "2 of 2 regions rewritten" in capsys.readouterr().out
    assert "sptc.choose_units" in (tmp_path / "out" / "graph0" / "02.rewritten.py").read_text()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["explain", "no_such_module:f"], "no module 'no_such_module'"),
        (["explain", "{factory}:nothing"], "has no 'nothing'"),
        (["explain", "{factory}:number"], "is no function but int"),
        (["explain", "{factory}:only_a_model"], "must return (model, example_inputs), got Linear"),
        (["explain", "{factory}:three"], "got a tuple of int, int, int"),
        (["explain", "./no/such/folder"], "no model './no/such/folder'"),
        (["explain", "{factory}:ffn", "--option", "ffn.block=3"], "did you mean 'ffn.blocks'"),
        (["explain", "{factory}:ffn", "--option", "ffn.blocks=many"], "'ffn.blocks' must be int"),
        (["explain", "{factory}:ffn", "--option", "ffn.blocks"], "must be KEY=VALUE"),
        (["explain", "{llama}", "--length", "65"], "more than the 64 positions"),
        (["explain", "{factory}:ffn", "--length", "8"], "makes inputs of its own size"),
        (["plan", "{factory}:ffn", "--speedup", "1.5", "--batch", "8"], "makes inputs of its own size"),
        (["dump", "{factory}:ffn", "--out", "factory_of_tests.py"], "option 'dump': cannot write"),
        (["plan", "{factory}:ffn", "--speedup", "0.5"], "speedup must be above 1"),
        (["plan", "{factory}:ffn", "--speedup", "1.5", "--out", "."], "--out '.' is a folder"),
        (["plan", "{factory}:ffn", "--max-memory", "0"], "max_memory must be a number of bytes above 0"),
        (["plan", "{factory}:ffn", "--max-memory", "1"], "a memory of 1 bytes is out of reach"),
        (["bench", "./no/such/folder"], "no model './no/such/folder'"),
        (["bench", "{factory}:only_a_model"], "must return (model, example_inputs), got Linear"),
        (["bench", "{factory}:ffn", "--variant", "half={{ffn.density: 0.5}}"], "is no JSON"),
        (["bench", "{factory}:ffn", "--variant", 'half={{"ffn.densty": 0.5}}'], "did you mean 'ffn.density'"),
        (["bench", "{factory}:ffn", "--only", "inducter"], "did you mean 'inductor'"),
        (["bench", "{factory}:ffn", "--length", "64"], "makes a batch of its own size"),
        (["bench", "{factory}:ffn", "--plan", "none.json"], "option 'plan': cannot read 'none.json'"),
        (["bench", "{factory}:ffn", "--json", "no/such/folder.json"], "there is no such folder"),
        (["bench", "{factory}:ffn", "--plot", "plot.gif"], "must end in .png or .svg"),
        (["bench", "{llama}", "--length", "32,65"], "more than the 64 positions"),
    ],
)
def test_mistakes_end_in_one_line(factory, folders, capsys, monkeypatch, arguments, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([a.format(factory=factory, **folders) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("sptc: ") and error.count("\n") == 1


def test_without_transformers_the_message_says_what_to_install(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["explain", folders["llama"]]) == 2
    assert "pip install 'sptc[hf]'" in capsys.readouterr().err


def test_a_model_that_takes_no_tokens_asks_for_a_factory(tmp_path, capsys):
    import transformers

    transformers.ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path)]) == 2
    assert "does not take tokens" in capsys.readouterr().err


def test_bytes_have_units(factory, capsys):
    from sptc.cli import _bytes

    assert [_bytes(text) for text in ("1e3", "5MB", "2GiB", "1.5 kb")] == [1e3, 5e6, 2 * 2.0**30, 1500]
    with pytest.raises(SystemExit):
        main(["plan", f"{factory}:ffn", "--max-memory", "2 apples"])
    assert "must be bytes, such as 2e9, 500MB or 2GiB, got '2 apples'" in capsys.readouterr().err


def test_options_are_read_by_type():
    pairs = ["ffn.density=0.5", "ffn.blocks=4", "ffn.enabled=False", "attention.selector=pooled", "dump=a=b", 'inductor={"x": 1}']
    assert parse_options(pairs) == {
        "ffn.density": 0.5,
        "ffn.blocks": 4,
        "ffn.enabled": False,
        "attention.selector": "pooled",
        "dump": "a=b",
        "inductor": {"x": 1},
    }
    with pytest.raises(ConfigError, match="given twice"):
        parse_options(["ffn.blocks=4", "ffn.blocks=8"])


@pytest.mark.parametrize("given", ["0", "x"])
def test_counts_are_numbers_from_1_on(given, capsys):
    with pytest.raises(SystemExit):
        main(["explain", "any:model", "--length", given])
    assert f"argument --length: must be a number of at least 1, got '{given}'" in capsys.readouterr().err


def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sptc", "explain", "./no/such/folder"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("sptc", run_name="__main__")
    assert "sptc: no model './no/such/folder'" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_compares_and_writes_all_it_is_asked_for(factory, tmp_path, capsys):
    """Processes of their own, and Inductor: half a minute on two cores that nothing else uses."""
    arguments = ["--only", "eager,half,wrong", "--variant", 'half={"ffn.density": 0.5, "decline": "never", "ffn.context_density": null}']
    arguments += ["--variant", 'wrong={"inductor": {"no_such_setting": 1}, "ffn.density": 0.5, "decline": "never"}', "--steps", "5"]
    files = [str(tmp_path / name) for name in ("bench.json", "bench.html", "bench.svg")]
    status = main(["bench", f"{factory}:ffn", *arguments, "--json", files[0], "--html", files[1], "--plot", files[2]])
    assert status == 1, "a variant failed"
    printed = capsys.readouterr().out
    assert "half is" in printed and "failed: wrong: " in printed and "no_such_setting" in printed
    made = json.loads((tmp_path / "bench.json").read_text())
    assert made["settings"]["model"] == f"{factory}:ffn" and made["versions"]["torch"] and made["sources"]
    eager, half, wrong = made["cases"][0]["variants"]
    assert eager["check"]["passed"] and half["regions"] == {"rewritten": 1, "found": 1} and wrong["failed"]
    assert [sum(len(turn["wall"]) for turn in v["steps"]) for v in (eager, half, wrong)] == [5, 5, 0]
    assert half["compile_seconds"]["cold"] > half["compile_seconds"]["warm"] > 0 and half["faster"]["wall"]["median"] > 0
    assert half["check"]["cosine"] < 0.999 < 1, "half of the hidden units are left out"
    assert "<table>" in (tmp_path / "bench.html").read_text() and "<svg" in (tmp_path / "bench.svg").read_text()
