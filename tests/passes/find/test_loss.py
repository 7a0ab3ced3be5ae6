"""Losses that are found in their spellings and equal eager mode, and what is refused or declined, with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss

import sptc
from tests.models.compiled import gradients, without_inductor
from tests.passes.find.losses import (
    ALONE,
    CLASSES,
    LENGTH,
    B,
    D,
    Loss,
    Model,
    assert_rewritten_and_equal,
    assert_same,
    batch,
    compiled_gradients,
    flat,
    refused,
    shifted,
)


def padded(t: Tensor) -> Tensor:
    return nn.functional.pad(t, (0, 1), value=-100)[:, 1:].contiguous()


SPELLINGS: dict[str, tuple[Loss, str]] = {
    "mean": (lambda y, t: cross_entropy(*flat(y, t)), "u0"),
    "sum": (lambda y, t: cross_entropy(*flat(y, t), reduction="sum"), "u0"),
    "sum over the labels of all devices": (lambda y, t: cross_entropy(*flat(y, t), reduction="sum") / 7, "u0"),
    "sum over a tensor": (lambda y, t: cross_entropy(*flat(y, t), reduction="sum") / (t != -100).sum(), "u0"),
    "cut off": (lambda y, t: cross_entropy(*shifted(y, t)), "u0"),
    "labels shifted by padding": (lambda y, t: cross_entropy(*flat(y.float(), padded(t))), "u0"),
    "classes second": (lambda y, t: cross_entropy(y.transpose(1, 2), t), "u0"),
    "classes second, cut off, turned": (lambda y, t: cross_entropy(y[:, :-1].permute(1, 2, 0), t[:, 1:].t()), "u0"),
    "log_softmax and nll_loss": (lambda y, t: nll_loss(log_softmax(y, -1).reshape(-1, CLASSES), t.reshape(-1)), "u0"),
    "log_softmax of classes second": (lambda y, t: nll_loss(log_softmax(y.transpose(1, 2), 1), t, reduction="sum"), "u0"),
    "cross entropy of log_softmax": (lambda y, t: cross_entropy(*flat(log_softmax(y, -1), t)), "u0"),
    "cut off from before the first row": (lambda y, t: cross_entropy(*flat(y[:, -2 * LENGTH : -1], t[:, 1:])), "u0"),
    "classes from before the first": (
        lambda y, t: cross_entropy(y[..., -3 * CLASSES : CLASSES - 1].flatten(0, 1), t.clamp(max=CLASSES - 2).flatten()), "u0"),
    "scaled": (lambda y, t: cross_entropy(*flat(y / 2.0, t)), "0.5*u0"),
    "soft cap": (lambda y, t: cross_entropy(*flat(torch.tanh(y / 3.0) * 3.0, t)), "3*tanh(0.3333333333333333*u0)"),
    "capped after it is cut off": (lambda y, t: cross_entropy(*flat(2 * torch.tanh(y[:, 2:-1]), t[:, 2:-1])), "2*tanh(u0)"),
    "smoothed": (lambda y, t: cross_entropy(*flat(y, t), label_smoothing=0.1), "u0"),
    "ignored by another number": (lambda y, t: cross_entropy(*flat(y, t.masked_fill(t == -100, 3)), ignore_index=3), "u0"),
    "labels of 32 bits": (lambda y, t: cross_entropy(*flat(y, t.int().long())), "u0"),
    "a part of the classes": (lambda y, t: cross_entropy(y[..., 5:30].reshape(-1, 25), t.clamp(-100, 24).reshape(-1)), "u0"),
    "used twice": (lambda y, t: cross_entropy(*flat(y, t)) ** 2, "u0"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    loss, transform = SPELLINGS[name]
    assert assert_rewritten_and_equal(Model(loss), *batch()).computes == transform


class Conv1D(nn.Module):
    """As GPT-2 stores weights: [in, out], by addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, CLASSES)), nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, D), self.weight).view(*x.shape[:-1], CLASSES)


class BiasAfter(nn.Module):
    """A bias [1, classes] added to the logits, as BART has it."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(D, CLASSES, bias=False)
        self.bias = nn.Parameter(torch.randn(1, CLASSES), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.bias


def adapted(freeze: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(D, CLASSES)), LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name or not freeze)
    return model


HEADS: dict[str, Callable[[], nn.Module]] = {
    "without bias": lambda: nn.Linear(D, CLASSES, bias=False),
    "frozen": lambda: nn.Linear(D, CLASSES).requires_grad_(False),
    "conv1d": Conv1D,
    "bias after": lambda: BiasAfter(True),
    "frozen bias after": lambda: BiasAfter(False),
    "lora on a frozen head": lambda: adapted(True),
    "lora on a trained head": lambda: adapted(False),
}


@pytest.mark.parametrize("name", HEADS)
def test_head(name):
    torch.manual_seed(0)
    assert_rewritten_and_equal(Model(SPELLINGS["cut off"][0], HEADS[name]()), *batch())


@pytest.mark.parametrize("spelling", ["mean", "sum", "smoothed"])
@pytest.mark.parametrize("counted", [0.0, 0.25, 1.0])
def test_labels_that_count(spelling, counted):
    """With none the mean is NaN and gradients are zeros, as in eager mode."""
    assert_rewritten_and_equal(Model(SPELLINGS[spelling][0]), *batch(counted))


def test_tied_to_the_embedding():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.inner = nn.Embedding(CLASSES, D), nn.Linear(D, D)

        def forward(self, labels: Tensor) -> Tensor:
            h = torch.tanh(self.inner(self.tokens(labels)))
            return cross_entropy(*shifted(h @ self.tokens.weight.t(), labels))

    assert_rewritten_and_equal(Tied(), torch.randint(CLASSES, (B, LENGTH)))


def test_one_compile_for_all_counts_and_few_for_all_lengths():
    model = Model(SPELLINGS["cut off"][0])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=without_inductor(**ALONE))
    for length, counted in [(19, 0.5), (19, 0.0), (19, 1.0), (19, 0.1), (13, 0.5), (11, 0.3), (17, 0.0)]:
        inputs = batch(counted, length)
        want = gradients(model, model(*inputs))
        assert_same(gradients(model, compiled(*inputs)), want)
    report = sptc.report(compiled)
    assert report.graphs == 2
    assert [r.status for r in report.regions if r.kind == "loss"] == ["rewritten"] * 2


def test_under_autocast():
    """bf16 products, no worse than eager mode under autocast; the loss is a number in fp32."""
    model, inputs = Model(SPELLINGS["cut off"][0]), batch()
    reference = copy.deepcopy(model).double()
    want = gradients(reference, reference(inputs[0].double(), inputs[1]))
    with torch.autocast("cpu", torch.bfloat16):
        eager = gradients(model, model(*inputs))
        loss, got, (row,) = compiled_gradients(model, *inputs)
    assert row.status == "rewritten" and loss.dtype == torch.float32
    for name, gradient in want.items():
        errors = [float((g[name].double() - gradient).abs().max() / gradient.abs().max()) for g in (got, eager)]
        assert errors[0] <= 1.5 * errors[1] + 2**-8, (name, errors)


def test_logits_that_the_graph_returns_in_part():
    def loss(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(*shifted(y.float(), t)), y[:, :, :]

    row = refused(Model(loss), *batch())
    assert row.rule == "logits"
    assert row.reason.startswith("the graph returns its logits (")
    assert "options={'loss.logits': 'drop'} would not, with 0.00" in row.reason
    assert assert_rewritten_and_equal(Model(loss), *batch(), **{"loss.logits": "drop"}).reason.endswith(" are dropped")


def test_graphs_without_gradients_stay_as_they_are():
    model = Model(lambda y, t: (cross_entropy(*flat(y, t)), y))
    compiled = torch.compile(model.requires_grad_(False), backend=without_inductor(**ALONE, **{"loss.logits": "drop"}))
    torch.testing.assert_close(compiled(*batch()), model(*batch()))
    (row,) = (r for r in sptc.report(compiled).regions if r.kind == "loss")
    assert (row.status, row.reason) == ("declined", "no gradient is recorded here")


def test_few_classes_are_declined():
    model = Model(lambda y, t: cross_entropy(y.flatten(0, 1), t.flatten().clamp(-100, 15)), nn.Linear(D, 16))
    row = refused(model, *batch())
    assert (row.status, row.reason) == ("declined", "would not pay: 16 classes of 8 features")
    assert_rewritten_and_equal(model, *batch(), decline="never")


def test_options():
    model = Model(SPELLINGS["mean"][0])
    assert refused(model, *batch(), **{"loss.enabled": False}).reason == "option 'loss.enabled' is False"
    assert refused(model, *batch(), exclude=["head"]).reason == "option 'exclude' names it: 'head'"
    with pytest.raises(sptc.ConfigError, match=r"'loss\.logits' must be one of 'defer', 'keep', 'drop'"):
        without_inductor(**{"loss.logits": "none"})


class Autocast(nn.Module):
    """The model under autocast, its loss outside: autocast ends between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(x)
        return cross_entropy(*flat(y.float(), labels))


def test_autocast_that_ends_before_the_loss():
    model, inputs = Autocast(), batch()
    eager = gradients(model, model(*inputs))
    loss, got, (row,) = compiled_gradients(model, *inputs)
    assert row.status == "rewritten" and loss.dtype == torch.float32
    torch.testing.assert_close(float(loss), float(model(*inputs)), rtol=2**-8, atol=0)
    for name, gradient in eager.items():
        torch.testing.assert_close(got[name], gradient, rtol=2**-6, atol=2**-7 * float(gradient.abs().max()))


def test_an_ffn_that_gives_the_logits_leaves_them_to_the_loss():
    model = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, CLASSES)).requires_grad_(False)
    before = nn.Linear(D, D)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(*flat(model(before(x)), labels))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=without_inductor(**{"ffn.density": 0.5, "ffn.context_density": None, "decline": "never"}))
    compiled(*batch()).backward()
    rows = {r.kind: r for r in sptc.report(compiled).regions}
    assert rows["loss"].status == "rewritten"
    assert (rows["ffn"].status, rows["ffn"].reason) == ("declined", "its output is logits of a loss that is rewritten")


@pytest.mark.parametrize("order", ["ffn", "ffn, ffn"])
def test_what_reads_a_region_directly_reads_its_sparse_form(order):
    """No norm, no residual stream: the input of one region is the output of another one."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)) for _ in order.split(",")]
    model = Model(SPELLINGS["mean"][0], nn.Sequential(*layers, nn.Linear(D, CLASSES)))
    compiled = torch.compile(model, backend=without_inductor(**{"ffn.density": 0.5, "ffn.context_density": None, "decline": "never"}))
    compiled(*batch()).backward()
    assert {r.status for r in sptc.report(compiled).regions} == {"rewritten"}
    for layer in layers:  # half of the hidden units have no gradient: the layer that was run is the sparse one
        assert int((layer[2].weight.grad.abs().sum(0) == 0).sum()) == 2 * D
