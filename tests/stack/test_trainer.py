"""Hugging Face's Trainer on a model that was compiled in place: the script stays as it is, but for one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.stack.matrix import Cell, Run, check, rows
from tests.stack.models import examples, llama, lora
from tests.stack.results import record


def trainer(run: Run, model: Any, data: list[Any] | None = None, evaluate: bool = False, **arguments: Any) -> Any:
    """A Trainer whose every step is logged; one epoch of eight examples makes two steps."""
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments  # noqa: F401

    settings: dict[str, Any] = {
        "output_dir": str(run.folder),
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
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=pad,
    )


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """A batch padded on the right to its longest row, as DataCollatorForSeq2Seq does it; with a mask only where something is padded."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> Any:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_place(run: Run) -> None:
    model = run.train(lora(llama()))
    run.compile_in_place(model)
    t = trainer(run, model)
    t.train()
    run.losses = logged(t)


CELLS = (Cell("model.compile(backend='spt') in place", in_place),)


@pytest.mark.parametrize("cell", rows("Hugging Face Trainer", CELLS))
def test_trainer(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    record(record_property, check(cell, tmp_path))
