"""Logits that a graph returns beside its loss, or reads: they are the model's, whether kept, deferred or dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss

import sptc
from sptc.model.logits import DeferredLogits, DroppedLogits
from sptc.passes.find import returned as find_returned
from tests.models.compiled import gradients, without_inductor
from tests.passes.find.losses import (
    ALONE,
    CLASSES,
    LENGTH,
    B,
    D,
    Loss,
    Model,
    assert_same,
    batch,
    compiled_gradients,
    flat,
    shifted,
)

RETURNED: dict[str, tuple[Loss, bool]] = {
    "logits": (lambda y, t: (cross_entropy(*flat(y, t)), y), True),
    "logits, whose loss is of a part": (lambda y, t: (cross_entropy(*shifted(y.float(), t)), y), True),
    "a cast that the loss reads": (lambda y, t: (cross_entropy(*shifted(z := y.double(), t)), z), True),
    "a view": (lambda y, t: (cross_entropy(*flat(y, t)), y.flatten(0, 1)), True),
    "logits, whose loss is of what is computed of them": (lambda y, t: (cross_entropy(*flat(torch.tanh(y), t)), y), True),
    "what is computed of them": (lambda y, t: (cross_entropy(*flat(z := 3 * torch.tanh(y.float() / 3), t)), z), True),
    "the same, the loss of a part": (lambda y, t: (cross_entropy(*shifted(z := 3 * torch.tanh(y / 3), t)), z), True),
    "half of what is computed of them": (lambda y, t: (cross_entropy(*flat(3 * (z := torch.tanh(y)), t)), z), False),
    "what is computed of a part": (lambda y, t: (cross_entropy(*flat(z := torch.tanh(y[:, 2:-1]), t[:, 2:-1])), z), False),
    "logits twice": (lambda y, t: (cross_entropy(*flat(y, t)), y, y), True),
    "logits and a copy": (lambda y, t: (cross_entropy(*flat(y, t)), y, y.double()), False),
    "a part of the classes": (lambda y, t: (cross_entropy(y[..., 5:30].reshape(-1, 25), t.clamp(-100, 24).reshape(-1)), y), False),
}


RETURNING: dict[str, tuple[Callable[[], nn.Module], str]] = {  # and what is said of logits that are returned
    "trained": (lambda: nn.Linear(D, CLASSES), "computed besides"),
    "adapter": (lambda: Adapted(), "computed besides"),
    "frozen": (lambda: nn.Linear(D, CLASSES).requires_grad_(False), "computed once they are used"),
}


@pytest.mark.parametrize("head", RETURNING)
@pytest.mark.parametrize("name", RETURNED)
def test_logits_that_are_returned(name, head, monkeypatch):
    (loss, taken), (build, said) = RETURNED[name], RETURNING[head]
    assert_returned(Model(loss, build()), said if taken else None, monkeypatch)


@pytest.mark.parametrize("returned", ["with", "without"])
def test_logits_that_are_returned_with_a_bias_that_is_added_and_without(returned, monkeypatch):
    assert_returned(Prior(returned), "computed besides" if returned == "with" else None, monkeypatch)


def assert_returned(model: nn.Module, said: str | None, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """The loss is computed for the rows that count, and what its logits give outside reaches every gradient; `said` of them in the report,
    None where the loss is left as it is."""
    monkeypatch.setattr(find_returned, "_LEAST", 0)
    reference, (x, labels) = copy.deepcopy(model).double(), batch()

    def both(outputs: Any) -> Tensor:
        return outputs[0] + 3 * outputs[1].square().mean()

    for used in (lambda outputs: outputs[0], both):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=without_inductor(**ALONE, **options))
        outputs, wanted = compiled(x, labels), reference(x.double(), labels)
        (row,) = (r for r in sptc.report(compiled).regions if r.kind == "loss")
        assert (row.status, row.rule) == (("refused", "logits") if said is None else ("rewritten", None))
        assert said is None or row.reason.endswith(f" are {said}")
        assert isinstance(outputs[1], DeferredLogits) == (said == "computed once they are used")
        for got, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-6)
        assert_same(gradients(model, used(outputs)), gradients(reference, used(wanted)))


def hits(y: Tensor, t: Tensor) -> Tensor:
    return (y.argmax(-1) == t).sum()


READ: dict[str, tuple[Loss, str | None]] = {  # and the rule of the refusal
    "an accuracy": (lambda y, t: (cross_entropy(*flat(y, t)), hits(y, t)), None),
    "an accuracy of what the loss reads": (lambda y, t: (cross_entropy(*(read := shifted(y.float(), t))), hits(*read)), None),
    "an accuracy of another part": (lambda y, t: (cross_entropy(*shifted(y, t)), hits(y[:, 2:], t[:, 2:])), None),
    "an accuracy, and logits that are capped": (lambda y, t: (cross_entropy(*flat(z := torch.tanh(y), t)), hits(z, t)), None),
    "the best classes": (lambda y, t: (cross_entropy(*flat(y, t)), y.topk(3).indices), None),
    "probabilities without gradient": (lambda y, t: (cross_entropy(*flat(y, t)), y.detach().softmax(-1)), None),
    "the logits without gradient": (lambda y, t: (cross_entropy(*flat(y, t)), y.detach()), None),
    "the logits and an accuracy": (lambda y, t: (cross_entropy(*flat(y, t)), y, hits(y, t)), None),
    "what the graph returns in part": (lambda y, t: (cross_entropy(*flat(y, t)), y[:, 2:], hits(y, t)), "logits"),
    "the greatest logits": (lambda y, t: (cross_entropy(*flat(y, t)), y.topk(3).values), "escapes"),
    "their normalized logarithms": (
        lambda y, t: (nll_loss((z := log_softmax(y, -1)).flatten(0, 1), t.flatten()), z.detach().exp()), "escapes"),
    "a part of the classes": (lambda y, t: (cross_entropy(y[..., 5:30].flatten(0, 1), t.flatten().clamp(-100, 24)), hits(y, t)), None),
}  # fmt: skip


@pytest.mark.parametrize("logits", ["defer", "keep", "drop"])
@pytest.mark.parametrize("name", READ)
def test_logits_that_something_reads_without_gradient(name, logits, monkeypatch):
    monkeypatch.setattr(find_returned, "_LEAST", 0)
    loss, rule = READ[name]
    rule = None if rule == "logits" and logits == "drop" else rule
    model, (x, labels) = Model(loss), batch()
    reference = copy.deepcopy(model).double()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=without_inductor(**ALONE, **{"loss.logits": logits}))
    outputs, wanted = compiled(x, labels), reference(x.double(), labels)
    (row,) = (r for r in sptc.report(compiled).regions if r.kind == "loss")
    assert (row.status, row.rule) == (("rewritten", None) if rule is None else ("refused", rule)), row.reason
    returned = name in ("the logits without gradient", "the logits and an accuracy", "what the graph returns in part")
    assert isinstance(outputs[1], DroppedLogits) == (returned and logits == "drop")
    for got, want in zip(outputs, wanted, strict=True):
        if not isinstance(got, DroppedLogits):
            torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, outputs[0]), gradients(reference, wanted[0]))


class Prior(nn.Module):
    """Logits to which a bias [1, 1, classes] is added, as in BART, which the loss reads; returned are they, or those without."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(D, D), nn.Linear(D, CLASSES, bias=False)
        self.prior = nn.Parameter(torch.linspace(-3, 3, CLASSES)[None, None])
        self.returned = returned

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(self.inner(x))
        z = y + self.prior
        return cross_entropy(*flat(z, labels)), z if self.returned == "with" else y


class Adapted(nn.Module):
    """A head with LoRA, by PEFT's formula."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(D, CLASSES), nn.Linear(D, 2, bias=False), nn.Linear(2, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 0.5


@pytest.mark.parametrize("name", [name for name in RETURNED if RETURNED[name][1]])
def test_logits_of_a_frozen_head_are_kept_as_asked(name, monkeypatch):
    model = Model(RETURNED[name][0], nn.Linear(D, CLASSES).requires_grad_(False))
    assert_returned(model, "computed besides", monkeypatch, **{"loss.logits": "keep"})


def test_dropped_logits_raise_when_used():
    model = Model(lambda y, t: (cross_entropy(*flat(y, t)), y, y.detach().float(), y.mean()))
    _, _, (row,) = compiled_gradients(model, *batch(), **{"loss.logits": "drop"})
    assert row.rule == "escapes"  # a mean is none of the logits, and has a gradient

    model = Model(lambda y, t: (cross_entropy(*flat(y, t)), y, y.detach().float()))
    compiled = torch.compile(model, backend=without_inductor(**ALONE, **{"loss.logits": "drop"}))
    loss, *logits = compiled(*batch())
    for dropped in logits:
        assert not dropped.requires_grad and dropped.grad_fn is None and dropped.dtype == torch.float32  # who passes it on asks for these
        assert repr(dropped) == "DroppedLogits()"
        for use in (lambda y: y.argmax(-1), lambda y: y.shape, lambda y: y + 1, lambda y: log_softmax(y, -1), lambda y: y[0], float, list):
            with pytest.raises(sptc.DroppedLogitsError, match=r"logits that were not computed: .*'loss\.logits': 'drop'.*no_grad\(\)"):
                use(dropped)
    loss.backward()
    with torch.no_grad():
        assert compiled(*batch())[1].shape == (B, LENGTH, CLASSES)
