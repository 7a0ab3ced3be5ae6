"""A module's numbers, which Dynamo makes symbols with dynamic=True: a region's form may depend on them, and they may change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sptc
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor

Inner = Callable[["Numbered", Tensor], Tensor]


class Numbered(nn.Module):
    def __init__(self, inner: Inner, number: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.number = inner, number
        self.qkv, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self, x)


def attention(scores: Callable[[Numbered, Tensor, Tensor, Tensor], Tensor]) -> Inner:
    """Over [b * h, n, d]; the mask is causal."""

    def inner(model: Numbered, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 2, 8).transpose(1, 2).reshape(b * 2, n, 8) for t in model.qkv(x).chunk(3, -1))
        y = torch.bmm(scores(model, q, k.mT, torch.full((n, n), -torch.inf).triu(1)).softmax(-1), v)
        return y.view(b, 2, n, 8).transpose(1, 2).reshape(b, n, 16)

    return inner


def ffn(act: Callable[[Numbered, Tensor], Tensor]) -> Inner:
    return lambda model, x: model.down(act(model, model.up(x)))


REGIONS = {
    "scores times it": attention(lambda m, q, k, mask: q @ k * m.number + mask),
    "queries times it": attention(lambda m, q, k, mask: (q * m.number) @ k + mask),
    "mask times it": attention(lambda m, q, k, mask: torch.add(q @ k, mask, alpha=m.number)),
    "added": attention(lambda m, q, k, mask: q @ k + mask + m.number),
    "alpha and beta": attention(lambda m, q, k, mask: torch.baddbmm(mask, q, k, beta=m.number, alpha=m.number)),
    "filled": attention(lambda m, q, k, mask: (q @ k).masked_fill(mask < 0, -1e9 * m.number)),
    "floor": attention(lambda m, q, k, mask: (q @ k + mask.clamp(min=-1e9)).clamp(min=-1e9 * m.number)),
    "activation's own": ffn(lambda m, u: F.leaky_relu(u, m.number)),
    "factor": ffn(lambda m, u: F.gelu(u) * m.number),
    "alpha": ffn(lambda m, u: torch.add(F.gelu(u), u, alpha=m.number)),
    "checkpointed": lambda m, x: checkpoint(REGIONS["factor"], m, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_number_of_a_module_is_one_of_the_region(name):
    model = Numbered(REGIONS[name], 0.5)
    compiled = torch.compile(model, backend=without_inductor(**FULL), dynamic=True)
    for number, n in ((0.5, 11), (0.75, 13)):
        model.number = number
        x = torch.randn(3, n, 16)
        want = gradients(model, model(x).square().sum())
        assert_gradients_close(gradients(model, compiled(x).square().sum()), want)
    assert {region.status for region in sptc.report(compiled).regions} == {"rewritten"}
