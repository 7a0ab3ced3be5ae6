"""The task of a real model, with a tiny one in its place; and what is evaluated: a model as served, as trained, and before training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import sptc
from bench.quality import gsm8k, training
from bench.quality.language_model import Shape, new_model
from bench.quality.rise import rises
from bench.quality.served import served
from bench.quality.tasks import Budget, Examples, Task, adapted
from bench.quality.tokens import IGNORED, train_tokenizer
from bench.quality.training import Record, evaluate, share_of_rate, train
from bench.quality.variants import variant

SHAPE = Shape(vocabulary=320, width=32, hidden=64, layers=1, heads=2, length=64)
BUDGET = Budget(steps=4, batch=2, learning_rate=3e-3, every=4, held_out=4, falling=True)
SPARSE = '{"attention.query_block": 8, "attention.key_block": 8, "attention.density": 0.25}'


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(["what is one and one? It is two."], 320), eos_token="<end>")


@pytest.fixture(scope="module")
def task(tokenizer: PreTrainedTokenizerFast) -> Task:
    lines = [json.dumps({"question": f"What is {i} and {i}?", "answer": f"It is {i + i}."}) for i in range(6)]
    problems = gsm8k.examples(gsm8k.tokenized(tokenizer, lines), SHAPE.length, padding=0)
    torch.manual_seed(0)
    train_examples, held_out = Examples(problems.take(slice(0, 2))), Examples(problems.take(slice(2, 6)))
    return gsm8k.task(new_model(SHAPE), train_examples, held_out, "tiny")


def test_a_problem_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    ((prompt, answer),) = gsm8k.tokenized(tokenizer, [json.dumps({"question": "One and one?", "answer": "Two"})])
    assert tokenizer.decode(prompt) == "Question: One and one?\nAnswer: "
    assert tokenizer.decode(answer) == "Two<end>" and answer[-1] == tokenizer.eos_token_id


def test_answers_count_and_padding_is_hidden() -> None:
    problems = gsm8k.examples([([5, 6], [7, 8]), ([5] * 4, [7] * 3), ([5, 6, 9], [7, 8, 3])], length=6, padding=1)
    made = problems.inputs
    i = IGNORED
    assert made["input_ids"].tolist() == [[5, 6, 7, 8, 1, 1], [5, 6, 9, 7, 8, 3]]  # the second pair does not fit
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert made["labels"].tolist() == [[i, i, 7, 8, i, i], [i, i, i, 7, 8, 3]]
    full = gsm8k.stream(problems, 2, 5)  # without padding
    assert full["input_ids"].tolist() == [[5, 6, 7, 8, 5], [6, 9, 7, 8, 3]]
    assert full["labels"].tolist() == [[i, i, 7, 8, i], [i, i, 7, 8, 3]]
    with pytest.raises(ValueError, match="2 sequences of 6 tokens are more than the 10"):
        gsm8k.stream(problems, 2, 6)


def test_packages_are_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carries_a_model").mkdir()
    (tmp_path / "carries_a_model" / "__init__.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    assert gsm8k.package_folder("carries_a_model") == tmp_path / "carries_a_model"
    assert "carries_a_model" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="make quality"):
        gsm8k.package_folder("carries_no_model")


def test_the_learning_rate_falls() -> None:
    budget = replace(BUDGET, steps=20)
    falling = [share_of_rate(step, budget) for step in range(20)]
    assert falling[0] == 0.5 and falling[1] == 0.95 and falling[10] == 0.5
    assert falling[1:] == sorted(falling[1:], reverse=True) and falling[-1] == pytest.approx(0.05)
    steady = [share_of_rate(step, replace(budget, falling=False)) for step in range(20)]
    assert steady == [0.5, *[1.0] * 19]


def test_a_run_with_a_falling_rate(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns, each copy starts from the same weights, and no average is evaluated."""
    monkeypatch.setattr(training, "Average", lambda *_: pytest.fail("averaged the weights of a falling learning rate"))
    record = Record("gsm8k", "tiny", *variant(f"sparse={SPARSE}"), 0, BUDGET, "aot")
    train(task, record)
    assert record.losses[-1] < record.losses[0] and record.rewritten == 2
    torch.manual_seed(1)
    untrained = evaluate(task.objective().eval(), task.held_out, BUDGET.batch, step=0)
    assert record.dense_points[0].loss == pytest.approx(untrained.loss, rel=1e-5)  # a LoRA adapter starts at zero, whatever the seed
    assert record.dense_points[-1].loss < untrained.loss


class Headed(nn.Module):
    """A model with something to train beside its adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = adapted(new_model(SHAPE))
        self.bias = nn.Parameter(torch.zeros(SHAPE.vocabulary))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits + self.bias


def test_what_is_served_is_the_saved_adapter_in_a_plain_model() -> None:
    """Of a prepared model too: routers and stand-ins are no part of it, and neither is a scale that only the live adapter has."""
    nothing = Examples({"labels": torch.empty(0)})
    ids = torch.randint(SHAPE.vocabulary, (2, SHAPE.length))
    batch = {"input_ids": ids, "labels": ids}
    objective = Headed()
    sptc.prepare(objective, batch, {"ffn.selector": "router"})
    trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert any("spt" in name for name in trained)
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.1)

    state = torch.get_rng_state()
    plain = served(Task("lm", "tiny", nothing, nothing, Headed), objective)
    assert torch.equal(torch.get_rng_state(), state)
    assert not plain.training and not any("spt" in name for name, _ in plain.named_modules())
    (loaded,) = (module for module in plain.modules() if isinstance(module, PeftModel))
    assert loaded.active_adapter == "default"
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch), objective.eval()(**batch))
        for module in objective.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= 2
        again = served(Task("lm", "tiny", nothing, nothing, Headed), objective)
        torch.testing.assert_close(again(**batch), plain(**batch))
        assert not torch.allclose(objective(**batch), plain(**batch), atol=1e-3)


def test_as_trained_is_with_gradients(task: Task) -> None:
    seen = []

    def objective(**inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(torch.is_grad_enabled())
        return tuple(torch.ones(3, requires_grad=True).unbind())

    for as_trained in (True, False):
        assert evaluate(objective, task.held_out, 4, 0, as_trained).loss == 1.0
    assert seen == [True, False]


def test_the_rise_before_training(task: Task) -> None:
    """None where every key and every block are kept."""
    exact = '{"attention.density": 1.0, "ffn.density": 1.0, "ffn.context_density": 1.0}'
    variants = dict(variant(text) for text in ("dense", f"exact={exact}", f"sparse={SPARSE}"))
    found = {name: (loss, rise) for name, loss, rise in rises(task, variants, BUDGET, "aot")}
    assert list(found) == ["dense", "exact", "sparse"]
    plain = found["dense"][0]
    assert found["dense"][1] == pytest.approx(0, abs=1e-5) == found["exact"][1]
    assert abs(found["sparse"][1]) > 1e-4
    assert all(loss - rise == pytest.approx(plain) for loss, rise in found.values())
