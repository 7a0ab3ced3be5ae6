"""What the cells train: a tiny llama with an adapter, and batches that it can learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.zoo import CASES, LAYERS, VOCABULARY

LENGTH = 19
NO_HOOK = "model.enable_input_require_grads = lambda: None"
REGIONS = {"attention": LAYERS, "ffn": LAYERS}  # of every causal language model here


def llama(dropout: float = 0.0, **options: Any) -> Any:
    """A llama of transformers in train mode, two layers of width 32, always the same weights.

    Args:
        dropout: of attention.
        options: further fields of its config.
    """
    torch.manual_seed(0)
    case = CASES["llama-sdpa"]
    return case.build(dropout, **options).train()  # type: ignore[call-arg]  a partial that takes them


def without_hook(model: Any) -> Any:
    """`model`, whose embedding no framework will hook for reentrant checkpoints: other gradients need no hook, and a graph ends at it."""
    model.enable_input_require_grads = lambda: None
    return model


def lora(model: nn.Module, **fields: Any) -> Any:
    """`model` with LoRA of rank 4 on all linear layers, or as `fields` of LoraConfig say; no tensor of it starts at zero."""
    from peft import LoraConfig

    return adapted(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}))


def adapted(model: nn.Module, config: Any) -> Any:
    """`model` as a PeftModel of `config`. What PEFT starts at zero starts at small numbers, so that every gradient says something."""
    from peft import get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, config).train()
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Trained tensors that are all zero become small random ones."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point() and not p.any():
                p.normal_(std=0.05)


def examples(count: int = 8, lengths: tuple[int, ...] = (LENGTH,), prompt: int = 7) -> list[dict[str, list[int]]]:
    """Tokenized examples in which labels of the first `prompt` tokens are ignored; the i-th has `lengths[i % len(lengths)]` tokens."""
    generator = torch.Generator().manual_seed(2)
    out = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (lengths[i % len(lengths)],), generator=generator).tolist()
        out.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return out


def batch(rows: int = 4, length: int = LENGTH) -> dict[str, Tensor]:
    """One batch of such examples."""
    chosen = examples(rows, (length,))
    return {key: torch.tensor([row[key] for row in chosen]) for key in ("input_ids", "labels")}
