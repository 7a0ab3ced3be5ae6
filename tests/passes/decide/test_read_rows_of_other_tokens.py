"""Padding of some tokens says nothing of others, be they as many."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from tests.models.compiled import FULL, without_inductor
from tests.passes.decide.padded import LAYERS, padded, rows
from tests.passes.ffns import CLASSES, D, Gated


class BartLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 16, "encoder_layers": LAYERS, "decoder_layers": 1, "vocab_size": 50, "max_position_embeddings": 64}
        sizes |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("ffn_dim", 24), ("attention_heads", 2))}
        self.bart = BartForConditionalGeneration(BartConfig(**sizes, use_cache=False, dropout=0.0))

    def forward(self, **inputs: Tensor) -> tuple[Tensor]:
        return (self.bart(**inputs).loss,)


def test_labels_of_other_tokens_than_the_padded_ones() -> None:
    """Of a decoder, shorter than its encoder: its own FFNs tell tokens apart while padding is left out of the encoder's."""
    torch.manual_seed(0)
    model, inputs = BartLoss().eval(), padded()  # in training mode older versions of transformers break the graph to drop layers
    inputs["labels"] = inputs["input_ids"][:, :7].masked_fill(torch.arange(7) > 4, -100)
    options = {**FULL, "ffn.context_density": 0.5, "attention.enabled": False}
    compiled = torch.compile(model, backend=without_inductor(**options))
    compiled(**inputs)[0].backward()
    assert rows(compiled) == ["visible"] * LAYERS + ["all"]
    torch._dynamo.reset()


class Other(nn.Module):
    """A decoder, or queries of its own, that read from what is padded: as many tokens, and others."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.decoder, self.own = decoder, nn.Parameter(torch.randn(13, D))
        self.tokens, self.attention = nn.Embedding(CLASSES, D), nn.Linear(D, 3 * D)
        self.first, self.second, self.head = Gated(), Gated(), nn.Linear(D, CLASSES)

    def read(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (part(t)[:, None] for part, t in zip(self.parts(), (x, y, y), strict=True))
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None].bool())[:, 0]

    def parts(self) -> list[Any]:
        weights, biases = self.attention.weight.chunk(3), self.attention.bias.chunk(3)
        return [lambda x, w=w, b=b: F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(input_ids % CLASSES)
        x = x + self.first(self.read(x, x, attention_mask))
        y = self.tokens(labels.clamp(min=0) % CLASSES) if self.decoder else self.own.expand(len(x), -1, -1)
        y = self.read(y, x, attention_mask)
        logits = self.head(y + self.second(y))
        return F.cross_entropy(logits.flatten(0, 1), labels.where(labels < 0, labels % CLASSES).flatten()), logits


@pytest.mark.parametrize("decoder", [True, False], ids=["decoder", "queries"])
def test_padding_is_not_that_of_as_many_other_tokens(decoder: bool) -> None:
    """Logits that are returned beside the loss are read of all of them, whatever the encoder's padding is."""
    torch.manual_seed(0)
    model, inputs = Other(decoder).train(), padded()
    compiled = torch.compile(copy.deepcopy(model), backend=without_inductor(**FULL))
    torch.testing.assert_close(compiled(**inputs)[1], model(**inputs)[1])
    assert rows(compiled) == ["visible", "all"]
