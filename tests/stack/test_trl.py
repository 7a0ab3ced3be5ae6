"""Trainers of TRL on a model that was compiled in place."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import sptc
from tests.models.zoo import VOCABULARY
from tests.stack.matrix import MEASURED, SPARSE, Cell, Run, check, rows
from tests.stack.models import LENGTH, NO_HOOK, batch, examples, llama, lora, shake, without_hook
from tests.stack.results import record
from tests.stack.test_trainer import logged

ADAPTER = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def tokenizer() -> Any:
    """A word for each number below the vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **more,
    }


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def trained(run: Run, trainer: Any) -> None:
    """TRL makes the PeftModel itself: it is compiled once the trainer is there."""
    shake(trainer.model)
    run.train(trainer.model)
    run.compile_in_place(trainer.model)
    trainer.train()
    run.losses = logged(trainer)


def sft(run: Run, lengths: tuple[int, ...] = (LENGTH,), completion: bool = False, own: bool = False, **more: Any) -> None:
    """SFTTrainer.

    Args:
        own: the model computes its loss itself, as in the Trainer of transformers; the first one is TRL's. Its embedding has no hook.
    """
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class ModelsLoss(SFTTrainer):
        compute_loss = Trainer.compute_loss

    texts = [words(row["input_ids"]) for row in examples(8, lengths)]
    data = [{"prompt": text[:20], "completion": text[20:]} for text in texts] if completion else [{"text": text} for text in texts]
    config = SFTConfig(**arguments(run.folder, **more))
    model, dataset = llama(use_cache=True), Dataset.from_list(data)
    made = ModelsLoss if own else SFTTrainer
    if own:
        without_hook(model)
    trainer = made(model=model, args=config, train_dataset=dataset, processing_class=tokenizer(), peft_config=ADAPTER)
    if own:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad():
            losses = [which.compute_loss(trainer, trainer.model, dict(batch)) for which in (ModelsLoss, SFTTrainer)]
        torch.testing.assert_close(*losses, rtol=1e-2 if trainer.args.bf16 else 1e-5, atol=0)
        trainer._metrics["train"].clear()
    trained(run, trainer)


def dpo(run: Run, copied: bool = False) -> None:
    """The reference is the same compiled model under another adapter: after training it still is the model that training started from.

    Args:
        copied: the adapter is there before the trainer, which makes a copy of it, named "ref"; else the reference is without adapter.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    texts = [words(row["input_ids"]) for row in examples(16)]
    data = [{"prompt": a[:20], "chosen": a[20:], "rejected": b[20:]} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    config = DPOConfig(**arguments(run.folder, max_length=24))
    base = llama(use_cache=True)
    model, adapter = (lora(base), None) if copied else (base, ADAPTER)
    plain = copy.deepcopy(model)
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer(), peft_config=adapter)
    assert ("ref" in trainer.model.peft_config) == copied
    trained(run, trainer)
    inputs = next(iter(trainer.get_train_dataloader()))
    got = trainer.compute_ref_log_probs(trainer.model, inputs)
    mask = inputs["completion_mask"][:, 1:]
    with torch.no_grad():
        logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    want = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0].mul(mask).sum(1)
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-5, atol=1e-4)


def grpo(run: Run) -> None:
    """Rollouts are dense, as all inference is. With an exact forward pass what is scored is the same policy: only gradients are thin."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [sum(len(word) for word in text.split()) / 10 for text in completions]

    data = [{"prompt": words(row["input_ids"][:6])} for row in examples(8)]
    config = GRPOConfig(
        **arguments(run.folder, num_train_epochs=1, max_steps=2, num_generations=4, max_completion_length=13, temperature=1.0, seed=5)
    )
    trainer = GRPOTrainer(
        model=llama(use_cache=True),
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        reward_funcs=reward,
        peft_config=ADAPTER,
    )
    trained(run, trainer)
    run.report = sptc.report(trainer.model)
    model, ids = trainer.model, batch()["input_ids"]
    scores = [model(input_ids=ids).logits.detach()]  # records gradients, so this graph is that of training
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        scores.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*scores)


OUTSIDE = "TRL computes the loss in an operator of its own, outside of the graph: densities that are given hold for all tokens"
OWN = "class Own(SFTTrainer): compute_loss = transformers.Trainer.compute_loss"
EXACT_FORWARD = {"decline": "never", "attention.enabled": False, "max_rise": 0, "ffn.gradient_density": 0.5}
MIXED = (9, 13, 7, 11)

CELLS = (
    Cell("SFTTrainer", sft, 3, why=OUTSIDE, needs="trl"),
    Cell(
        "SFTTrainer, default densities",
        sft,
        3,
        {"attention": 2},
        {"ffn": "let the model compute its loss from labels, in one graph with its layers, or set attention.density"},
        options={"decline": "never"},
        needs="trl",
    ),
    Cell(
        "SFTTrainer, the model's own loss, default densities",
        partial(sft, own=True, completion=True),
        2,
        options=MEASURED,
        why=OWN,
        needs="trl",
    ),
    Cell(
        "SFTTrainer, the model's own loss, logits dropped",
        partial(sft, own=True, completion=True),
        2,
        options={**SPARSE, "loss.logits": "drop"},
        why=OWN,
        needs="trl",
    ),
    Cell("SFTTrainer, completion-only loss", partial(sft, completion=True), 3, needs="trl"),
    Cell("SFTTrainer, packing", partial(sft, lengths=MIXED, max_length=24, packing=True), 3, needs="trl"),
    Cell("SFTTrainer, padding_free", partial(sft, lengths=MIXED, max_length=None, padding_free=True), 6, needs="trl"),
    Cell(
        "SFTTrainer, gradient checkpointing and bf16 (its defaults)",
        partial(sft, gradient_checkpointing=True, bf16=True),
        6,
        tolerance=0.05,
        needs="trl",
    ),
    Cell(
        "SFTTrainer, the model's own loss, default densities, gradient checkpointing and bf16",
        partial(sft, own=True, completion=True, gradient_checkpointing=True, bf16=True),
        2,
        options=MEASURED,
        tolerance=0.05,
        why=f"{OWN}; {NO_HOOK}",
        needs="trl",
    ),
    Cell("DPOTrainer, reference by disable_adapter", dpo, 6, needs="trl"),
    Cell("DPOTrainer, reference by a copy of the adapter", partial(dpo, copied=True), 6, needs="trl"),
    Cell("GRPOTrainer, two steps with an exact forward pass", grpo, 6, {"ffn": 2}, options=EXACT_FORWARD, falls=False, needs="trl"),
)


@pytest.mark.parametrize("cell", rows("TRL", CELLS))
def test_trl(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    record(record_property, check(cell, tmp_path))
