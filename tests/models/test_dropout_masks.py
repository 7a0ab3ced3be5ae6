"""Dropout of the rewritten regions: backward differentiates the very mask that forward applied, recomputed in a checkpoint or not.

Masks are read off outputs: values, or both projections, are the identity. torch's own dropout is another matter: docs/known-upstream.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import sptc
from tests.models.compiled import FULL, without_inductor

P = 0.25
SIZE = 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(1, 2, SIZE, 16)) for _ in range(2))
        self.v = nn.Parameter(torch.eye(SIZE).expand(1, 2, SIZE, SIZE).clone())

    def forward(self) -> Tensor:
        return scaled_dot_product_attention(self.q, self.k, self.v, dropout_p=P)

    def with_mask(self, mask: Tensor) -> Tensor:
        return torch.softmax(self.q @ self.k.mT / 4, -1) * mask / (1 - P) @ self.v


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.rand(1, 2 * SIZE, SIZE) + 0.5)
        self.up, self.down = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False)
        for weight in (self.up.weight, self.down.weight):
            nn.init.eye_(weight)

    def forward(self) -> Tensor:
        return self.down(torch.dropout(torch.relu(self.up(self.x)), P, True))

    def with_mask(self, mask: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.x)) * mask / (1 - P))


class Checkpointed(nn.Module):
    """Computed again in backward: what is random must not be drawn again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> Tensor:
        return checkpoint(self.inner, use_reentrant=False)


def check(inner: nn.Module, checkpointed: bool, backend: Any, **compile_options: Any) -> None:
    """Two steps of the compiled model, each against the explicit formula with the mask that its forward applied."""
    compiled = torch.compile(Checkpointed(inner) if checkpointed else inner, backend=backend, **compile_options)
    masks = []
    for _ in range(2):
        inner.zero_grad()
        out = compiled()
        incoming = torch.randn_like(out)
        out.backward(incoming)
        got = {name: p.grad.clone() for name, p in inner.named_parameters()}
        mask = out.detach() != 0
        masks.append(mask)
        inner.zero_grad()
        expected = inner.with_mask(mask)  # type: ignore[operator]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        expected.backward(incoming)
        for name, parameter in inner.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]
    assert not torch.equal(*masks), "each step draws anew"
    for mask in masks:
        assert abs(mask.float().mean() - (1 - P)) < 5 * (P * (1 - P) / mask.numel()) ** 0.5
        fours = mask.view(-1, 4).sum(-1)
        alike = ((fours == 0) | (fours == 4)).float().mean()
        assert abs(alike - P**4 - (1 - P) ** 4) < 5 * 0.5 / len(fours) ** 0.5, "neighbours are independent"


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("make", [Attention, Ffn])
def test_backward_has_the_mask_of_forward(make: Callable[[], nn.Module], checkpointed: bool) -> None:
    torch.manual_seed(0)
    check(make(), checkpointed, without_inductor(**FULL))


@pytest.mark.parametrize("make", [Attention, Ffn])
def test_backward_has_the_mask_of_forward_under_inductor(make: Callable[[], nn.Module]) -> None:
    """Where a checkpoint's seed is drawn again, in another kernel."""
    torch.manual_seed(0)
    check(make(), True, "spt", options=FULL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("make", [Attention, Ffn])
def test_backward_has_the_mask_of_forward_on_a_gpu(make: Callable[[], nn.Module], checkpointed: bool) -> None:
    torch.manual_seed(0)
    options = {**FULL, "attention.query_block": 16, "attention.key_block": 16}
    check(make().cuda(), checkpointed, "spt", options=options)
