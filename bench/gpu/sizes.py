"""What a run is done with: on a GPU layers of well-known models as the product treats them, on a CPU the same at sizes for a dry run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.ffn import Case as FfnCase
from bench.kernels import check
from bench.kernels.cases import AttentionCase
from sptc.codegen.triton.launchers.selection import default_blocks
from sptc.codegen.triton.target import KNOWN, Target, target_of

RANK = 16
_TOKENS = 8192


@dataclass(frozen=True)
class Sizes:
    """`dtypes` are checked, the first of them is timed. `lengths` are those of the whole model's sequences, of `tokens` a step."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    checks: tuple[AttentionCase, ...]
    attention: tuple[AttentionCase, ...]
    ffn: dict[str, FfnCase]
    model: dict[str, Any]  # arguments of a LlamaConfig
    lengths: tuple[int, ...]
    tokens: int
    rounds: int
    side: int  # of the square product that measures the rate
    bytes: int  # that are copied to measure the rate
    kernels: int | None = None  # to compile beforehand; None: all
    patience: float = 1.0  # by which all limits are longer

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    def target(self) -> Target:
        """That of the device; of a dry run one to compile for."""
        return KNOWN["sm_90"] if self.dry else target_of(self.device)


def _attention(name: str, length: int, heads: int, kv_heads: int, size: int, mask: str, tokens: int = _TOKENS) -> AttentionCase:
    blocks = default_blocks(length, length, 1 / 8, own=mask == "causal")
    return AttentionCase(f"{name} n={length}", max(1, tokens // length), length, heads, kv_heads, size, mask, 1 / 8, *blocks)


def _model(size: int, hidden: int, heads: int, kv_heads: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": size,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }


FULL = Sizes(
    torch.device("cuda"),
    (torch.bfloat16, torch.float16),
    check.CASES,
    (
        _attention("LLaMA-8B", 8192, 32, 8, 128, "causal"),
        _attention("LLaMA-8B", 2048, 32, 8, 128, "causal"),
        _attention("OPT-1.3B", 2048, 32, 32, 64, "causal"),
        _attention("BERT-base", 512, 12, 12, 64, "none"),
    ),
    {
        "LLaMA-8B": FfnCase(_TOKENS, 4096, 14336, "swiglu", bias=False, lora=RANK, trained=True),
        "OPT-1.3B": FfnCase(_TOKENS, 2048, 8192, "relu", lora=RANK, trained=True),
        "BERT-base": FfnCase(_TOKENS, 768, 3072, "gelu", lora=RANK, trained=True),
    },
    _model(4096, 14336, heads=32, kv_heads=8, layers=2, vocabulary=4096),
    (8192, 2048),
    _TOKENS,
    rounds=9,
    side=8192,
    bytes=2**30,
)
_SMALL = AttentionCase("causal n=64", 1, 64, 2, 1, 16, "causal", query_block=32, key_block=16)
DRY = Sizes(
    torch.device("cpu"),
    (torch.float32, torch.float16),
    (replace(_SMALL, length=37, density=0.5, query_block=16, key_block=8),),
    (_SMALL,),
    {"ReLU": FfnCase(24, 32, 64, "relu", lora=4, trained=True, blocks=4)},
    _model(32, 64, heads=2, kv_heads=1, layers=1, vocabulary=32),
    (32,),
    32,
    rounds=1,
    side=64,
    bytes=2**20,
    kernels=2,
    patience=10.0,
)
