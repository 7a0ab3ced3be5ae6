"""What the examples train: a causal language model on sums. In a script of your own, this is your model and your data."""

from __future__ import annotations

import random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

LENGTH = 256  # tokens a sequence


def load(name: str | None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The model of a Hugging Face name or folder, or a tiny one with random weights that reads bytes, with LoRA on all linear layers."""
    if name is not None:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        tokenizer, heads = ByT5Tokenizer(), {"num_attention_heads": 4, "num_key_value_heads": 2}
        size = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**size, **heads, max_position_embeddings=LENGTH))
    model.config.use_cache = False
    return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")), tokenizer


def texts(count: int) -> list[dict[str, str]]:
    """Prompts of fifteen sums with their results and one without, whose result is the completion."""
    numbers, found = random.Random(0), []
    for _ in range(count):
        pairs = [(numbers.randrange(100), numbers.randrange(100)) for _ in range(16)]
        *solved, last = (f"{a} + {b} = {a + b}" for a, b in pairs)
        question, _, answer = last.rpartition(" ")
        found.append({"prompt": "\n".join([*solved, question]), "completion": f" {answer}"})
    return found


def examples(tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Tensor]]:
    """input_ids, attention_mask and labels, int64 [LENGTH] each, of which completions count. One length for all needs one compile."""
    rows = []
    for text in texts(count):
        prompt, answer = (tokenizer(text[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion"))
        ids = (prompt + answer)[-LENGTH:]
        padding = LENGTH - len(ids)
        rows.append(
            {
                "input_ids": torch.tensor(ids + [tokenizer.pad_token_id] * padding),
                "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
                "labels": torch.tensor([-100] * (len(ids) - len(answer)) + answer + [-100] * padding),
            }
        )
    return rows
