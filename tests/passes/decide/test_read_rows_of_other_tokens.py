"""Padding of some tokens says nothing of others, be they as many."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, BartForConditionalGeneration

from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.passes.decide.padded import LAYERS, assert_small_as_dense, padded, rows
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


def attended(x: Tensor, mask: Tensor) -> Tensor:
    q = x.view(*x.shape[:2], 2, D // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask[:, None, None, :].bool()).transpose(1, 2).flatten(2)


class Pooled(nn.Module):
    """The mean of rows by a copy of the mask that was written to, or by the mask itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.ffn, self.head = how, Gated(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        x = attended(x, attention_mask)
        x = x + self.ffn(x)
        if self.how == "before a checkpoint":
            attention_mask[:, -1] = 1
            x = checkpoint(attended, x, attention_mask, use_reentrant=False)
            return (F.cross_entropy(self.head(x[:, 0]), labels),)
        weights = attention_mask if self.how == "the mask itself" else attention_mask.clone()
        if self.how == "a row":
            weights[0] = 1
        elif self.how == "a view":
            weights[:, 9:].fill_(1)
        elif self.how != "no write":
            weights[:, -1] = 1
        if self.how == "cast later":
            weights = weights.unsqueeze(-1).to(x.dtype).squeeze(-1)
        return (F.cross_entropy(self.head((x * weights[..., None]).sum(1)), labels),)


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("no write", "visible"),
        ("the last token", "all"),
        ("a row", "all"),
        ("a view", "all"),
        ("cast later", "all"),
        ("the mask itself", "all"),
        ("before a checkpoint", "all"),
    ],
)
def test_mask_that_was_written_to_is_no_mask_of_padding(how: str, want: str) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 13, D), "labels": torch.tensor([0, 2, 1])}
    model, mask = Pooled(how), padded()["attention_mask"]
    reference = copy.deepcopy(model).double()
    expected = reference(**{**inputs, "x": inputs["x"].double()}, attention_mask=mask.clone())[0]
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    loss = compiled(**inputs, attention_mask=mask.clone())[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_gradients_close(gradients(model, loss), gradients(reference, expected))
    assert rows(compiled) == ["visible" if how == "no write" else "all"]
    torch._dynamo.reset()


class Mixer(nn.Module):
    """An FFN of features, not of tokens, where there are as many of both."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.head = Gated(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor]:
        y = self.ffn(x.transpose(1, 2)).transpose(1, 2)
        return (F.cross_entropy(self.head(y).view(-1, CLASSES), labels.view(-1)),)


def test_features_are_no_tokens_that_count() -> None:
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (3, D)).masked_fill(torch.rand(3, D) > 0.4, -100)
    assert_small_as_dense(Mixer(), {"x": torch.randn(3, D, D), "labels": labels}, ["all"])
