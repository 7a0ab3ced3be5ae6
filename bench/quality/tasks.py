"""Tasks: what is trained, on which examples, and what counts as its loss. `gsm8k.py` has the one of a real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.demo.classifier import RANK, classifier, default_model, tokenizer
from bench.demo.pieces import PACKAGES, Pieces, read_pieces
from bench.quality.language_model import MODELS, pretrained
from bench.quality.text import Split, documented_functions, headers, library_halves, read
from bench.quality.tokens import IGNORED, cut, pack, pairs

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """How long is trained, and how much is evaluated."""

    steps: int = 100
    batch: int = 8
    learning_rate: float = 2e-3
    every: int = 20  # steps between evaluations
    held_out: int = 64  # most held-out sequences
    falling: bool = False  # the learning rate falls to nearly nothing, and the last weights are evaluated instead of an average


@dataclass(frozen=True)
class Examples:
    """Sequences as the objective takes them: `input_ids` and `labels`, int64 [N, ...] each, and whatever else the model is given."""

    inputs: Inputs

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def take(self, rows: Tensor | slice) -> Inputs:
        return {name: value[rows] for name, value in self.inputs.items()}

    def spread(self, most: int) -> Examples:
        """`most` of them, evenly spaced."""
        rows = torch.linspace(0, len(self) - 1, min(most, len(self))).long()
        return Examples(self.take(rows))


@dataclass(frozen=True)
class Task:
    """`objective()` makes a new model with LoRA on every linear layer; its forward takes `Inputs` and returns a tally (see `tally`)."""

    name: str
    model: str
    train: Examples
    held_out: Examples
    objective: Callable[[], nn.Module]


def tally(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, right answers and labels that count, each 0-d, of logits [N, classes] and labels [N]; IGNORED labels do not count."""
    loss = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return loss, (logits.detach().argmax(-1) == labels).sum(), (labels != IGNORED).sum()


class Classification(nn.Module):
    """One label a sequence."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tally(self.model(input_ids, attention_mask), labels)


class NextToken(nn.Module):
    """One label a token: what is predicted at the position before it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return tally(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def classify(budget: Budget, _: str) -> Task:
    """The demo's task: MiniLM tells which package of the standard library a piece of source is from."""
    name = default_model()
    parts = read_pieces(tokenizer(name), 512, budget.held_out)

    def examples(pieces: Pieces) -> Examples:
        ids = pieces.input_ids
        return Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": pieces.labels})

    train, held_out = map(examples, parts)
    return Task("classify", "MiniLM", train, held_out, lambda: Classification(classifier(name, len(PACKAGES), 0.0)))


def lm(budget: Budget, model: str) -> Task:
    """A language model of Python learns C++: torch's headers."""
    base = pretrained(MODELS[model])
    split = Split.of(headers())

    def examples(files: Any) -> Examples:
        ids = cut(base.tokenizer, map(read, files), base.shape.length)
        return Examples({"input_ids": ids, "labels": ids})

    train, held_out = examples(split.train), examples(split.held_out)
    return Task("lm", model, train, held_out.spread(budget.held_out), lambda: NextToken(adapted(base.model())))


def answers(budget: Budget, model: str) -> Task:
    """The docstring of a function from its code, in packages that pretraining has not seen; several functions fill a sequence."""
    base = pretrained(MODELS[model])
    split = Split.of(library_halves()[1])

    def examples(files: Any) -> Examples:
        found = pairs(base.tokenizer, (pair for path in files for pair in documented_functions(read(path))))
        ids, labels = pack(found, base.shape.length)
        return Examples({"input_ids": ids, "labels": labels})

    train, held_out = examples(split.train), examples(split.held_out)
    return Task("answers", model, train, held_out.spread(budget.held_out), lambda: NextToken(adapted(base.model())))


def adapted(model: nn.Module) -> nn.Module:
    """A causal language model with LoRA on every linear layer but the output's."""
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)
