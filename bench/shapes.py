"""Models with random weights, for `sptc bench bench.shapes:NAME --lora 16`: shapes decide, not values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Tensor]]
VOCABULARY = 8192


def qwen2(batch: int = 2, length: int = 1024) -> Made:
    """4 layers, d 768, FFN 3072 gated, 12 heads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # transformers takes seconds to import

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 12}
    return _made(Qwen2ForCausalLM, Qwen2Config(vocab_size=VOCABULARY, **sizes, use_cache=False), batch, length)


def llama(batch: int = 1, length: int = 4096) -> Made:
    """2 layers, d 768, FFN 2048 gated, 12 heads of which 4 have keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 4}
    return _made(LlamaForCausalLM, LlamaConfig(vocab_size=VOCABULARY, **sizes, max_position_embeddings=1 << 16), batch, length)


def opt(batch: int = 8, length: int = 512) -> Made:
    """2 layers, d 1024, FFN 4096 with ReLU, 16 heads: blocks of the paper's models."""
    return _opt(1024, batch, length)


def opt2048(batch: int = 8, length: int = 512) -> Made:
    """The same of twice the width: d 2048, FFN 8192, 32 heads."""
    return _opt(2048, batch, length)


def _opt(d: int, batch: int, length: int) -> Made:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": d, "word_embed_proj_dim": d, "ffn_dim": 4 * d, "num_hidden_layers": 2, "num_attention_heads": d // 64}
    return _made(OPTForCausalLM, OPTConfig(vocab_size=VOCABULARY, **sizes, dropout=0.0), batch, length)


def gpt2(batch: int = 4, length: int = 512) -> Made:
    """4 layers of GPT-2's sizes, d 768, FFN 3072, 12 heads, with its 50,257 words: most of a step's memory are logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model, inputs = _made(GPT2LMHeadModel, config, batch, length)
    model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # what it takes anyway, after a warning that breaks the graph before the loss
    return model, inputs


def _made(cls: Any, config: Any, batch: int, length: int) -> Made:
    config.use_cache = False
    torch.manual_seed(0)
    model = cls(config)
    ids = torch.randint(4, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids}
