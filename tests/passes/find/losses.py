"""A model with a loss and a head of one's choice, and what its compiled loss is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sptc
from sptc.reports.report import RegionReport
from tests.models.compiled import assert_gradients_close, gradients, without_inductor

B, LENGTH, D, CLASSES = 2, 19, 8, 40
ALONE = {"attention.enabled": False, "ffn.enabled": False}

Loss = Callable[[Tensor, Tensor], Any]


class Model(nn.Module):
    """Features [b, n, d] and labels [b, n] to a loss of logits, by a head of one's choice."""

    def __init__(self, loss: Loss, head: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.head = head or nn.Linear(D, CLASSES)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.loss(self.head(torch.tanh(self.inner(x))), labels)


def batch(counted: float = 0.5, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, labels = torch.randn(B, length, D), torch.randint(CLASSES, (B, length))
    return x, labels.masked_fill(torch.rand(B, length) >= counted, -100)


def compiled_gradients(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor], tuple[RegionReport, ...]]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=without_inductor(**ALONE, **options))
    out = compiled(*inputs)
    loss = out if isinstance(out, Tensor) else out[0]
    return loss.detach(), gradients(model, loss), tuple(r for r in sptc.report(compiled).regions if r.kind == "loss")


def assert_rewritten_and_equal(model: nn.Module, *inputs: Tensor, **options: Any) -> RegionReport:
    """The loss is rewritten, and it and every gradient are those of eager mode in fp64."""
    torch.manual_seed(0)
    reference = copy.deepcopy(model).double()
    out = reference(*(x.double() if x.is_floating_point() else x for x in inputs))
    want = out if isinstance(out, Tensor) else out[0]
    loss, got, (row,) = compiled_gradients(model, *inputs, **options)
    assert row.status == "rewritten", row
    torch.testing.assert_close(loss.double(), want.detach().double(), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert_same(got, gradients(reference, want))
    return row


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Within the suite's bound; where no label counts they are zeros."""
    if any(g.count_nonzero() for g in want.values()):
        assert_gradients_close(got, want)
    else:
        assert got.keys() == want.keys() and not any(g.count_nonzero() for g in got.values())


def refused(model: nn.Module, *inputs: Tensor, **options: Any) -> RegionReport:
    """The one row of the loss, which is left as it is, and gradients are those of eager mode."""
    _, got, (row,) = compiled_gradients(model, *inputs, **options)
    out = model(*inputs)
    assert_gradients_close(got, gradients(model, out if isinstance(out, Tensor) else out[0]))
    assert row.status != "rewritten"
    return row


def flat(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return y.reshape(-1, CLASSES), t.reshape(-1)


def shifted(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return flat(y[:, :-1], t[:, 1:])
