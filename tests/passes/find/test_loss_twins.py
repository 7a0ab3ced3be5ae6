"""Losses that are refused, each with its reason, and compute what eager mode does."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss

import sptc
from tests.models.compiled import without_inductor
from tests.passes.find.losses import CLASSES, LENGTH, B, D, Loss, Model, batch, compiled_gradients, flat, refused


def _mean(y: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(*flat(y, t))


class Twice(nn.Module):
    """The same logits for two purposes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + y.softmax(-1).amax()


def frozen_labels(y: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(*flat(y, t), weight=torch.arange(1.0, 1 + CLASSES))


def written(y: Tensor, t: Tensor) -> Tensor:
    y[..., 0] = -1e4
    return cross_entropy(*flat(y, t))


def without_gradients(y: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        scale = 1 + t.clamp(min=0).float().mean()
    return cross_entropy(*flat(y, t)) * scale


TWINS: dict[str, tuple[Loss, str, str]] = {
    "class weights": (frozen_labels, "weights", "the loss weighs classes"),
    "one number a label": (
        lambda y, t: cross_entropy(*flat(y, t), reduction="none").mean(), "reduction", r"one number a label \(reduction='none'\)"),
    "probabilities": (
        lambda y, t: cross_entropy(y.flatten(0, 1), torch.nn.functional.one_hot(t.flatten().clamp(0), CLASSES).float()),
        "labels", "holds probabilities, not labels"),
    "no log_softmax": (
        lambda y, t: nll_loss(y.flatten(0, 1), t.flatten()), "between", "that no log_softmax normalized"),
    "priors added to log_softmax": (
        lambda y, t: nll_loss(log_softmax(y, -1).flatten(0, 1) + torch.arange(1.0, 1 + CLASSES), t.flatten()),
        "between", "add.* stands between"),
    "log_softmax over the rows": (
        lambda y, t: nll_loss(log_softmax(y.flatten(0, 1), 0), t.flatten()), "between", "log_softmax.* stands between"),
    "another number for each row": (
        lambda y, t: cross_entropy(*flat(y / (1 + y.detach().norm(dim=-1, keepdim=True)), t)), "between", "div.* stands between"),
    "a temperature for each token": (
        lambda y, t: cross_entropy(*flat(y * (t != 3)[..., None], t)), "between", "mul.* stands between"),
    "rows picked by data": (
        lambda y, t: cross_entropy(y.flatten(0, 1)[t.flatten().clamp(0, 37)], t.flatten()), "between", "index.* stands between"),
    "every other row": (
        lambda y, t: cross_entropy(*flat(y[:, ::2], t[:, ::2])), "rows", "whose place is not a constant"),
    "changed in place": (written, "escapes", "is also used by"),
    "computed without gradients": (without_gradients, "mode-boundary", "switches autocast or grad mode"),
    "used beside the loss": (
        lambda y, t: cross_entropy(*flat(y, t)) + 1e-4 * y.logsumexp(-1).square().mean(), "escapes", "is also used by logsumexp"),
    "a kink": (lambda y, t: cross_entropy(*flat(y.clamp(min=-1.0), t)), "between", "clamp.* stands between"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_twin(name):
    loss, rule, reason = TWINS[name]
    row = refused(Model(loss), *batch(0.9))
    assert row.rule == rule
    assert re.search(reason, row.reason), row.reason


def test_logits_that_no_projection_gives():
    row = refused(Model(_mean, Twice()), *batch())
    assert row.rule == "between"
    row = refused(Model(_mean, nn.Sequential(nn.Linear(D, CLASSES), nn.LayerNorm(CLASSES))), *batch())
    assert row.rule == "between" and "layer_norm" in row.reason


@pytest.mark.parametrize(
    "of", [lambda y: y * 0.0, lambda y: y - y, lambda y: y.pow(0)], ids=["times 0", "less themselves", "to the power 0"]
)
def test_nothing_of_the_logits(of):
    """A scale that a model learned or was configured to have may be 0: a function of no logit."""
    model = Model(lambda y, t: cross_entropy(*flat(of(y), t)))
    x, labels = batch()
    loss, got, (row,) = compiled_gradients(model, x, labels, decline="never")
    torch.testing.assert_close(loss, model(x, labels).detach())
    assert not any(gradient.any() for gradient in got.values())
    assert row.rule == "between" and "the same number for every logit" in row.reason


def test_logits_of_another_graph():
    """As after a graph break: they are an input."""
    given = torch.randn(B, LENGTH, CLASSES, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(_mean, backend=without_inductor())
    compiled(given, batch()[1]).backward()
    (row,) = sptc.report(compiled).regions
    assert row.rule == "projection"
    assert re.fullmatch(r"its logits are an input of the graph, \w+: what projects them is in another one", row.reason)
