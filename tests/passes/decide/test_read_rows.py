"""Tokens whose FFN output nothing reads are left out, and only these: loss and every gradient are the dense ones in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import sptc
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.passes.decide.padded import LAYERS, assert_small_as_dense, padded, rows
from tests.passes.ffns import CLASSES, D, Gated


def llama(**given: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50} | given
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS, max_position_embeddings=64))


def gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_inner=24, n_head=2, n_layer=LAYERS, vocab_size=50, n_positions=64, **off))
    model.loss_type = "ForCausalLM"
    return model


def assert_as_dense(model: nn.Module, inputs: dict[str, Tensor], want: list[str], dynamic: bool | None = None, **options: Any) -> None:
    reference = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=without_inductor(**{**FULL, **options}), dynamic=dynamic)
    loss, expected = compiled(**inputs)[0], reference(**inputs)[0]
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)
    assert_gradients_close(gradients(model, loss), gradients(reference, expected))
    assert rows(compiled) == want
    torch._dynamo.reset()


@pytest.mark.parametrize("logits", ["keep", "drop"])
@pytest.mark.parametrize("how", ["plain", "cache", "checkpoints"])
def test_padding_and_the_last_layer(how: str, logits: str) -> None:
    torch.manual_seed(0)
    model = llama(use_cache=how == "cache").train()
    if how == "checkpoints":
        model.gradient_checkpointing_enable()
    last = "counted" if logits == "drop" else "visible"
    assert_as_dense(model, padded(), ["visible", last], **{"loss.logits": logits})


class Watched(nn.Module):
    """A model that tells the probabilities of every token, padding included, without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama(use_cache=False)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        result = self.inner(**inputs)
        return result.loss, result.logits.detach().softmax(-1)


def test_what_reads_logits_beside_the_loss_reads_all_tokens() -> None:
    torch.manual_seed(0)
    model = Watched().train()
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    torch.testing.assert_close(compiled(**padded())[1], copy.deepcopy(model)(**padded())[1])
    assert [r.status for r in sptc.report(compiled).regions if r.kind == "loss"] == ["rewritten"]
    torch._dynamo.reset()
    assert_as_dense(model, padded(), ["all", "all"])


def test_other_spellings_and_lengths() -> None:
    torch.manual_seed(0)
    assert_as_dense(gpt2().train(), padded(), ["visible", "counted"], **{"loss.logits": "drop"})
    assert_as_dense(llama(use_cache=False).train(), padded(), ["visible", "visible"], dynamic=True)


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": 50}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **off, num_labels=3, max_position_embeddings=64))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_classifier_reads_the_first_token(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    inputs = {**padded(), "labels": torch.tensor([0, 2, 1])}  # the first token of the second sequence is padding, and read
    assert_as_dense(bert().train(), inputs, ["visible", "visible"], dynamic=dynamic)


class Mean(nn.Module):
    """The mean of the tokens that are no padding, or of all."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked, self.bert, self.head = masked, bert().bert, nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor]:
        y = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).expand(y.shape).to(y.dtype)
        mean = (y * mask).sum(1) / mask.sum(1) if self.masked else y.mean(1)
        return (F.cross_entropy(self.head(mean), labels),)


@pytest.mark.parametrize(("masked", "want"), [(True, "visible"), (False, "all")])
def test_a_mean_reads_what_its_mask_leaves(masked: bool, want: str) -> None:
    torch.manual_seed(0)
    assert_as_dense(Mean(masked).train(), {**padded(), "labels": torch.tensor([0, 2, 1])}, [want] * LAYERS)


def test_options() -> None:
    torch.manual_seed(0)
    assert_as_dense(llama(use_cache=False).train(), padded(), ["all", "all"], **{"ffn.padding": "compute", "loss.logits": "drop"})
    inputs = padded()
    inputs["labels"] = inputs["input_ids"].clone()  # padding counts: it is computed
    assert_as_dense(llama(use_cache=False).train(), inputs, ["visible", "visible"])
    del inputs["attention_mask"]
    assert_as_dense(llama(use_cache=False).train(), inputs, ["all", "all"])


@pytest.mark.parametrize("options", [{"decline": "auto", "ffn.recompute": True}, {"loss.enabled": False}], ids=["declined", "disabled"])
def test_logits_of_a_loss_that_stays_dense_are_read_though_options_would_drop_them(options: dict[str, Any]) -> None:
    """With few classes a loss would not pay: the graph returns its logits, and they are those of the dense model where no padding is."""
    torch.manual_seed(0)
    model, inputs = llama(use_cache=False, vocab_size=20).train(), {k: v % 20 if k == "input_ids" else v for k, v in padded().items()}
    inputs["labels"] = inputs["labels"].where(inputs["labels"] == -100, inputs["input_ids"])
    compiled = torch.compile(copy.deepcopy(model), backend=without_inductor(**{**FULL, "loss.logits": "drop", **options}))
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(compiled(**inputs).logits[real], model(**inputs).logits[real])
    assert rows(compiled) == ["visible", "visible"]


THIN = {
    "units": {"ffn.density": 0.75, "ffn.context_density": 0.25},
    "units-alike": {"ffn.density": 0.5, "ffn.context_density": None},
    "gradients": {"max_rise": 0.0, "ffn.gradient_density": 0.75, "ffn.gradient_context_density": 0.25},
}


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("thin", THIN)
def test_sparse_forms_leave_padding_out_as_well(thin: str, checkpoints: bool) -> None:
    """Loss and gradients are those of the same form with padding computed."""
    torch.manual_seed(0)
    ids = torch.randint(50, (3, 8))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100  # 6 tokens count, 6 do not, 12 are padding: samples are whole multiples of the rows
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = []
    for padding in ("skip", "compute"):
        torch.manual_seed(1)
        model = llama(use_cache=False).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        options = {**THIN[thin], "ffn.padding": padding, "attention.enabled": False, "decline": "never"}
        compiled = torch.compile(model, backend=without_inductor(**options))
        loss = compiled(**inputs)[0]
        found.append((loss, gradients(model, loss)))
        assert rows(compiled) == ["visible" if padding == "skip" else "all"] * LAYERS
        torch._dynamo.reset()
    (loss, got), (expected, want) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_gradients_close(got, want)


class Small(nn.Module):
    """One attention over tokens behind an FFN and before another one; `how` says what else reads the first one's output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second, self.head = Gated(), Gated(), nn.Linear(D, CLASSES)
        self.mix = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        x = x + self.first(x)
        seen = attention_mask[:, None, None, :].bool()
        q = x.view(*x.shape[:2], 2, D // 2).transpose(1, 2)
        k = q * q.mean(2, keepdim=True) if self.how == "mean" else q
        if self.how == "unmasked":
            seen = torch.ones_like(seen)
        y = F.scaled_dot_product_attention(q, k, k, attn_mask=seen).transpose(1, 2).flatten(2)
        if self.how == "conv":
            y = y + self.mix(x.transpose(1, 2)).transpose(1, 2)
        y = x + y
        y = y + self.second(y)
        loss = F.cross_entropy(self.head(y).flatten(0, 1), labels.flatten())
        if self.how == "aside":
            loss = loss + 0.1 * x.square().mean()
        return (loss, y) if self.how == "returned" else (loss,)


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("plain", ["visible", "counted"]),
        ("mean", ["all", "counted"]),
        ("unmasked", ["all", "counted"]),
        ("conv", ["all", "counted"]),
        ("aside", ["all", "counted"]),
        ("returned", ["all", "all"]),
    ],
)
def test_what_anything_else_reads_is_computed(how: str, want: list[str]) -> None:
    torch.manual_seed(0)
    inputs = padded()
    inputs = {"x": torch.randn(3, 13, D), "labels": inputs["labels"].clamp(max=CLASSES - 1), "attention_mask": inputs["attention_mask"]}
    assert_small_as_dense(Small(how), inputs, want)


def test_a_query_that_sees_nothing_may_average_padding() -> None:
    """Before the first token of a sequence padded on the left stands one whose label counts, and whose keys are all hidden by finfo.min."""
    torch.manual_seed(0)
    model, found = llama(use_cache=False, attn_implementation="eager", initializer_range=0.3).train(), []
    for padding in ("skip", "compute"):
        compiled = torch.compile(model, backend=without_inductor(**FULL, **{"ffn.padding": padding, "attention.enabled": False}))
        loss = compiled(**padded())[0]
        found.append((loss, gradients(model, loss)))
        assert rows(compiled) == ["visible" if padding == "skip" else "all"] * LAYERS
        torch._dynamo.reset()
    (loss, got), (expected, want) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_gradients_close(got, want)


@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)], ids=["no sequence", "no token"])
def test_an_empty_batch(sizes: tuple[int, int]) -> None:
    """Its share of padding is none, and its tiles have no elements."""
    ffn, x, seen = Gated(), torch.randn(*sizes, D), torch.ones(sizes, dtype=torch.int64)

    def model(x: Tensor, seen: Tensor) -> Tensor:
        q = ffn(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q, seen[:, None, None, :].bool()) * seen[:, None, :, None]

    compiled = torch.compile(model, backend=without_inductor(**FULL))
    y = compiled(x, seen)
    assert y.shape == (sizes[0], 1, sizes[1], D)
    got = gradients(ffn, y.sum())
    assert {r.kind: r.status for r in sptc.report(compiled).regions} == {"attention": "rewritten", "ffn": "rewritten"}
    assert got and not any(g.count_nonzero() for g in got.values())


class Turned(nn.Module):
    """An FFN on rows without dimensions; then the sequence comes first, for what normalizes it, for another FFN, and for the loss."""

    def __init__(self, another: bool) -> None:
        super().__init__()
        self.another = another
        self.first, self.second, self.norm, self.head = Gated(), Gated(), nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor]:
        y = self.first(x.flatten(0, 1)).view(x.shape).transpose(0, 1)
        y = self.norm(self.second(y) if self.another else y)
        return (F.cross_entropy(self.head(y).flatten(0, 1), labels.flatten()),)


@pytest.mark.parametrize(("another", "want"), [(False, ["all"]), (True, ["all", "counted"])])
def test_labels_in_another_order_than_the_tokens_do_not_tell_which_are_read(another: bool, want: list[str]) -> None:
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (5, 3)).masked_fill(torch.arange(15).view(5, 3) % 4 < 2, -100)
    assert_small_as_dense(Turned(another), {"x": torch.randn(3, 5, D), "labels": labels}, want, **{"loss.logits": "drop"})


class Halves(nn.Module):
    """A classifier that reads the first token of each half of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.head = Gated(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        b, n, _ = x.shape
        x = x + self.ffn(x)
        q = x.view(b, n, 2, D // 2).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=attention_mask[:, None, None, :].bool()).transpose(1, 2).flatten(2)
        mean = (y * attention_mask[..., None]).sum(1).mean()
        return (F.cross_entropy(self.head(x.view(2 * b, n // 2, D)[:, 0]), labels) + mean,)


def test_a_first_token_of_parts_of_a_sequence_may_be_padding() -> None:
    torch.manual_seed(0)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 5:] = 0
    inputs = {"x": torch.randn(3, 12, D), "labels": torch.randint(CLASSES, (6,)), "attention_mask": mask}
    assert_small_as_dense(Halves(), inputs, ["all"])


class Normed(nn.Module):
    """The masked mean of rows that are divided by their length, with an epsilon or without one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.ffn, self.scale, self.head = how, Gated(), nn.Parameter(torch.ones(D)), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        q = x.view(*x.shape[:2], 2, D // 2).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, q, q, attn_mask=attention_mask[:, None, None, :].bool()).transpose(1, 2).flatten(2)
        y = self.scale * self.ffn(x)
        square = y.square().sum(-1, keepdim=True)
        if self.how == "inside":
            y = y * (square + 1e-6).rsqrt()
        elif self.how == "none":
            y = y * square.rsqrt()
        else:  # finite, but for the gradient of the scale
            y = y / (square.sqrt() + 1e-6)
        return (F.cross_entropy(self.head((y * attention_mask[..., None]).sum(1)), labels),)


@pytest.mark.parametrize(("how", "want"), [("inside", "visible"), ("none", "all"), ("outside", "all")])
def test_zeros_in_place_of_rows_become_no_nan(how: str, want: str) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 13, D), "labels": torch.tensor([0, 2, 1]), "attention_mask": padded()["attention_mask"]}
    assert_small_as_dense(Normed(how), inputs, [want])


class Broken(nn.Module):
    """Keys are used again behind a graph break, without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.head = Gated(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        q, k = (y.view(*x.shape[:2], 2, D // 2).transpose(1, 2) for y in (x, self.ffn(x)))
        y = F.scaled_dot_product_attention(q, k, k, attn_mask=attention_mask[:, None, None, :].bool())
        torch._dynamo.graph_break()
        y = y + F.scaled_dot_product_attention(y, k, k)
        return (F.cross_entropy(self.head(y.transpose(1, 2).flatten(2)[:, 0]), labels),)


def test_keys_may_be_read_behind_a_graph_break() -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 13, D), "labels": torch.tensor([0, 2, 1]), "attention_mask": padded()["attention_mask"]}
    assert_small_as_dense(Broken(), inputs, ["all"])


class BrokenBehindItsLoss(nn.Module):
    """Logits, or keys, are read by another loss behind a graph break."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.ffn, self.head = what, Gated(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        k = self.ffn(x).view(*x.shape[:2], 2, D // 2).transpose(1, 2)
        y = F.scaled_dot_product_attention(k, k, k, attn_mask=attention_mask[:, None, None, :].bool()).transpose(1, 2).flatten(2)
        logits = self.head(x + self.ffn(y))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch._dynamo.graph_break()
        return (loss + 0.1 * (logits.logsumexp(-1) if self.what == "logits" else k).square().mean(),)


@pytest.mark.parametrize("what", ["logits", "keys"])
def test_what_is_returned_beside_a_loss_may_be_read_behind_a_graph_break(what: str) -> None:
    torch.manual_seed(0)
    batch = padded()
    inputs = {"x": torch.randn(3, 13, D), "labels": batch["labels"] % CLASSES, "attention_mask": batch["attention_mask"]}
    inputs["labels"][batch["labels"] == -100] = -100
    assert_small_as_dense(BrokenBehindItsLoss(what), inputs, ["all", "all"])
