"""Masks that are computed in place, with fractions, or in narrow integers: attention is the dense one, however much of them is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sptc
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor

B, N, D = 3, 11, 8
IDS = torch.randint(0, 4, (B, N), generator=torch.Generator().manual_seed(3))
FLOATS = torch.randn(B, N, generator=torch.Generator().manual_seed(4)) * 4
BYTES = torch.randint(0, 256, (B, N), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
FLAGS = torch.rand(B, N, generator=torch.Generator().manual_seed(6)) > 0.4


def chosen(ids: Tensor) -> Tensor:
    return torch.isin(ids, torch.tensor([0, 2]))


def fractions(x: Tensor) -> Tensor:
    return (x % 1)[:, :, None] >= (x % 1)[:, None]


MASKS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "in place, of what is not read": (IDS, lambda p: chosen(p).logical_not_()[:, None]),
    "in place, of what is gathered": (IDS, lambda p: (p.gather(1, p).add_(1) >= 3)[:, None]),
    "in place, twice": (IDS, lambda p: (p.clamp(0, 3).mul_(2).sub_(3) > 0)[:, None]),
    "in place, of an input": (IDS, lambda p: p.add_(1)[:, :, None] >= 2 * p[:, None] - 3),
    "the remainder of fractions": (FLOATS, fractions),
    "the remainder of fractions against a number": (FLOATS, lambda x: ((x % 4) < 1)[:, None]),
    "a quotient of fractions": (FLOATS, lambda x: ((x // 1) % 4 < 2)[:, None]),
    "a sum that uint8 does not hold": (BYTES, lambda a: (a.long()[:, :, None] + a.long()[:, None]) < 300),
    "a product that uint8 does not hold": (BYTES, lambda a: (a.long() * 3 < 400)[:, None]),
    "a product that int32 does not hold": (BYTES.int() * 1024, lambda a: (a.long() * 16384 > 2**31)[:, None]),
    "a table at uint8": (BYTES % 4, lambda a: (torch.tensor([True, False, True, True])[a.long()])[:, None]),
    "uint8 below zero": (FLAGS, lambda p: ((p.byte() - 1) < 1)[:, None]),
    "int8 above its greatest": (FLAGS, lambda p: (p.to(torch.int8) * 100 * 2 > 0)[:, None]),
    "a constant of uint8": (IDS, lambda p: (torch.where(p > 1, -1, 3).to(torch.uint8) > 3)[:, None]),
    "fractions that fp32 rounds": (FLAGS, lambda p: (p.float() * 0.1 + 0.2 == 0.3)[:, None]),
    "a quotient that fp32 rounds": (FLAGS, lambda p: (p.float() * 49 / 49 == 1)[:, None]),
}


class Masked(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.qkv = mask, nn.Linear(D, 3 * D)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        shown = self.mask(given).expand(B, N, N) | torch.eye(N, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown[:, None]).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", MASKS)
def test_attention_is_the_dense_one(name: str) -> None:
    given, mask = MASKS[name]
    model, x = Masked(mask).double(), torch.randn(B, N, D, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    want, got = model(x, given.clone()), compiled(x, given.clone())
    torch.testing.assert_close(got, want)
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]
    assert_gradients_close(gradients(model, got.square().sum()), gradients(model, want.square().sum()))
