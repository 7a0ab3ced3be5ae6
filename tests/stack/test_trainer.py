"""Hugging Face's Trainer on a model that was compiled in place: the script stays as it is, but for one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sptc
from tests.models.zoo import documents
from tests.stack.matrix import MEASURED, PAPER, SPARSE, Cell, Run, check, rows
from tests.stack.models import NO_HOOK, batch, examples, llama, lora, without_hook
from tests.stack.results import record, record_verdict

LENGTHS = (19, 13, 17, 11, 23, 9)  # of examples that are padded to the longest of their batch


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right to its longest row, with a mask, as the collators of transformers make it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def trainer(folder: Path, model: Any, data: list[Any] | None = None, collate: Any = pad, **arguments: Any) -> Any:
    """A Trainer that logs every step; three epochs of eight examples, four at a time."""
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    data = data if data is not None else examples()
    training = TrainingArguments(**{**settings, **arguments})
    return Trainer(model=model, args=training, train_dataset=data, eval_dataset=data[:4], data_collator=collate)


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_place(
    run: Run, data: list[Any] | None = None, collate: Any = pad, attention: str = "sdpa", hook: bool = True, **arguments: Any
) -> Any:
    model = llama(use_cache=True, attn_implementation=attention)
    model = run.train(lora(model if hook else without_hook(model)))
    run.compile_in_place(model)
    t = trainer(run.folder, model, data, collate, **arguments)
    t.train()
    run.losses = logged(t)
    return t


def evaluated_and_generating(run: Run) -> None:
    """Evaluation every second step, `generate` after training, then training again: both are the dense model's."""
    t = in_place(run, eval_strategy="steps", eval_steps=2)
    if not run.sparse:
        return
    model, ids = t.model.eval(), batch(2)["input_ids"]
    plain = copy.deepcopy(model)  # a copy is not compiled
    trained = run.compiles
    kept = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **kept), plain.generate(input_ids=ids, **kept))
    want = trainer(run.folder, plain).evaluate()["eval_loss"]
    assert t.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    t.train()
    assert run.compiles == trained, "generating, evaluating and training on compile nothing more"


def checkpointed(run: Run, reentrant: bool, hook: bool = True) -> None:
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    in_place(run, hook=hook, **arguments)


def packed(rows: list[dict[str, list[int]]], mask: bool) -> dict[str, torch.Tensor]:
    """Documents one after the other in a row; positions start again at each of them."""
    out = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    out["position_ids"] = documents().repeat(len(rows) // 2, 1)
    if mask:
        out["attention_mask"] = torch.ones_like(out["input_ids"])
    return out


def padding_free(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """All examples of a batch as one row, as DataCollatorWithFlattening makes it; no token is padding."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening(return_position_ids=True)(rows)


def best_at_end(run: Run) -> None:
    t = in_place(run, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    best = min(entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry)
    assert t.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def resumed(run: Run) -> None:
    """Killed after step 4 of 6: the run that goes on has the losses of one that was never interrupted."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    in_place(run, **saving)
    if run.sparse:
        uninterrupted, weights = run.losses, {name: p.detach().clone() for name, p in run.trained.items()}
        torch._dynamo.reset()
        model = lora(llama(use_cache=True))
        model.compile(backend=run.backend)
        t = trainer(run.folder, model, **saving)
        t.train(resume_from_checkpoint=str(run.folder / "checkpoint-4"))
        assert logged(t) == uninterrupted  # the log of the checkpoint holds the first four
        torch.testing.assert_close({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, weights)


def prepared(run: Run) -> None:
    """The paper's recipe: state of its own, from `sptc.prepare`."""
    model = lora(llama())
    if run.kind != "eager":
        sptc.prepare(model, batch(), run.options)
    run.train(model)
    run.compile_in_place(model)
    t = trainer(run.folder, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: sptc.step(model))
    t.optimizer = optimizer
    t.train()
    run.losses = logged(t)


HOOK = "transformers' hook on the embedding, which reentrant checkpoints need, ends a graph before the layers"

CELLS = (
    Cell("model.compile in place", in_place, fast=True),
    Cell("evaluation and generate in between", evaluated_and_generating, compiles=2, fast=True),
    Cell("gradient accumulation", partial(in_place, gradient_accumulation_steps=2, per_device_train_batch_size=2)),
    Cell("label smoothing", partial(in_place, label_smoothing_factor=0.1)),
    Cell("bf16", partial(in_place, bf16=True), tolerance=0.05),
    Cell("gradient checkpointing", partial(checkpointed, reentrant=False), compiles=3, why=HOOK),
    Cell("gradient checkpointing, reentrant", partial(checkpointed, reentrant=True), compiles=3, why=HOOK),
    Cell(
        "gradient checkpointing, default densities",
        partial(checkpointed, reentrant=False, hook=False),
        options=MEASURED,
        why=NO_HOOK,
    ),
    Cell("padded batches of varying length", partial(in_place, data=examples(12, LENGTHS)), compiles=2, fast=True),
    Cell(
        "the same, grouped by length", partial(in_place, data=examples(12, LENGTHS), train_sampling_strategy="group_by_length"), compiles=2
    ),
    Cell("packing: positions that start again", partial(in_place, collate=partial(packed, mask=False))),
    Cell("packing with a mask of ones", partial(in_place, collate=partial(packed, mask=True))),
    Cell("padding-free batches", partial(in_place, data=examples(12, LENGTHS), collate=padding_free), compiles=2),
    Cell("attention spelled out (eager)", partial(in_place, attention="eager")),
    Cell("load_best_model_at_end", best_at_end, compiles=2),
    Cell("save every k steps, resume_from_checkpoint", resumed, compiles=2, fast=True),
    Cell("logits dropped", in_place, options={**SPARSE, "loss.logits": "drop"}),
    Cell("the paper's option, sptc.prepare", prepared, options=PAPER, tolerance=None),
    Cell("by Inductor", in_place, inductor=True),
    Cell("by Inductor, gradient checkpointing", partial(checkpointed, reentrant=False, hook=False), why=NO_HOOK, inductor=True),
)


@pytest.mark.parametrize("cell", rows("Hugging Face Trainer", CELLS))
def test_trainer(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    record(record_property, check(cell, tmp_path))


def fails(script: Callable[[], None]) -> BaseException:
    """What a script ends with, before any step of an optimizer; a compile's own error is what is inside of Dynamo's."""
    steps: list[None] = []
    handle = register_optimizer_step_pre_hook(lambda *_: steps.append(None))
    try:
        with pytest.raises(Exception) as caught:
            script()
    finally:
        handle.remove()
    assert not steps
    return getattr(caught.value, "inner_exception", caught.value)


@pytest.mark.cell("Hugging Face Trainer", "torch.compile(model) in place of model.compile")
@pytest.mark.parametrize("saved_by", ["peft", "transformers"])
def test_a_wrapped_model_is_refused_before_training(saved_by: str, tmp_path: Path, record_property: Any) -> None:
    """It trained, and the adapter that it saved was empty."""
    run = Run("sparse", tmp_path, SPARSE)
    wrapped = run.compile(lora(llama()) if saved_by == "peft" else llama())
    error = fails(lambda: trainer(tmp_path, wrapped, remove_unused_columns=False).train())
    assert isinstance(error, sptc.ConfigError) and 'model.compile(backend="spt"' in str(error)
    record_verdict(record_property, "an error before the first step", str(error))


@pytest.mark.cell("Hugging Face Trainer", 'TrainingArguments(torch_compile_backend="spt")')
def test_accelerate_knows_no_other_backend(tmp_path: Path, record_property: Any) -> None:
    """accelerate has a closed list of backends, without a registration. What is certain is that nothing runs dense without a word."""
    error = fails(lambda: trainer(tmp_path, lora(llama()), torch_compile=True, torch_compile_backend="spt").train())
    assert "DynamoBackend" in str(error)
    record_verdict(record_property, "accelerate's error before the first step", f"{error}: write model.compile(backend='spt') instead")
