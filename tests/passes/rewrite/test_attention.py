"""What is no number spreads as in the dense model at density 1, and never becomes a number below it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sptc
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor

N, ODD = 37, 25


class Attention(nn.Module):
    """Four query heads, `key_heads` of keys and values, behind projections of one input."""

    def __init__(self, spelling: str, key_heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.key_heads = spelling, key_heads
        self.q, self.k, self.v = (nn.Linear(16, 4 * heads) for heads in (4, key_heads, key_heads))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, 4)).transpose(1, 2) for projection in (self.q, self.k, self.v))
        if self.spelling == "is_causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.spelling == "grouped":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        elif self.spelling == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q @ k.mT / 2).masked_fill(~mask, -torch.inf) if self.spelling == "spelled" else q @ k.mT / 2
            y = scores.softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)


CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
PADDED = (torch.arange(N) < 30)[None, None, None, :].expand(2, 1, 1, N)  # and ODD is not padding
MASKS = {"causal": CAUSAL, "padded": PADDED, "both": CAUSAL & PADDED}


@pytest.mark.parametrize("where", [0, ODD, N - 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("spelling", "key_heads"), [("is_causal", 4), ("fused", 4), ("grouped", 2), ("grouped", 1), ("spelled", 4), ("all", 4)]
)
def test_nan_in_a_token_is_in_the_rows_of_the_dense_model(spelling, key_heads, mask, where):
    model, x = Attention(spelling, key_heads), torch.randn(2, N, 16)
    x[0, where] = torch.nan
    want = model(x, MASKS[mask]).isnan()
    assert want[0].all() and not want[1].any()  # hidden keys weigh 0, and 0 times NaN is NaN
    got = torch.compile(model, backend=without_inductor(**FULL))(x, MASKS[mask])
    assert torch.equal(got.isnan(), want)


def test_a_number_keeps_its_gradients():
    model, x = Attention("grouped", 2).double(), torch.randn(2, N, 16, dtype=torch.double, requires_grad=True)

    def gradients(call):
        return torch.autograd.grad(call(x, CAUSAL).square().sum(), [x, *model.parameters()])

    got = gradients(torch.compile(model, backend=without_inductor(**FULL)))
    for one, other in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class Distances(nn.Module):
    """Scores to which whole numbers, or truths, are added."""

    def __init__(self, truths: bool) -> None:
        super().__init__()
        self.truths, self.qkv = truths, nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        apart = (torch.arange(N)[:, None] - torch.arange(N)).abs() // 5
        return (q @ k.mT + (apart % 2 == 0 if self.truths else -apart)).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("truths", [False, True])
def test_what_is_added_to_scores_may_be_whole_numbers(truths, dtype):
    model, x = Distances(truths).to(dtype), torch.randn(2, N, 16, dtype=dtype, requires_grad=True)

    def outcome(call):
        y = call(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])

    compiled = torch.compile(model, backend=without_inductor(**FULL))
    got, want = outcome(compiled), outcome(model)
    tolerance = 1e-9 if dtype == torch.float64 else 0.05
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]


class Widened(nn.Module):
    """Two layers of attention; a mask that the second one sees more by is written to in place, behind the first."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.qkv = spelling, nn.Linear(16, 48)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone() if self.spelling == "fused" else torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -1e30)
        for _ in range(2):
            q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
            if self.spelling == "fused":
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                mask[:, 1:] = True
            else:
                y = (q @ k.mT / 4 + mask).softmax(-1) @ v
                mask[:, 1:] = 0.0
            x = x + y[:, 0]
        return x


@pytest.mark.parametrize("spelling", ["fused", "spelled"])
def test_mask_may_be_written_to_behind_its_attention(spelling):
    model, x = Widened(spelling).double(), torch.randn(2, N, 16, dtype=torch.double)
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    want, got = model(x, CAUSAL), compiled(x, CAUSAL)
    torch.testing.assert_close(got, want)
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"] * 2
    assert_gradients_close(gradients(model, got.square().sum()), gradients(model, want.square().sum()))
