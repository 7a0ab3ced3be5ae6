"""Seconds of what is in no region."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sptc.config import Config
from sptc.model.capture import capture
from sptc.passes import ANALYSIS
from sptc.passes.decide.remainder import remainder_seconds
from sptc.passes.runner import run
from sptc.passes.unit import Unit
from tests.planning_device import DEVICE

PRODUCTS_ONLY = replace(DEVICE, bandwidth=1e30, exponentials=1e30)
BYTES_ONLY = replace(DEVICE, single=replace(DEVICE.single, gemm=1e30, attention=1e30, attention_backward=1e30), exponentials=1e30)
GEMM = DEVICE.single.gemm


def seconds(model: nn.Module, x: Tensor, device=PRODUCTS_ONLY) -> float:
    found: list[float] = []

    def judge(gm: fx.GraphModule, inputs: list[Any]) -> None:
        found.append(remainder_seconds(run(Unit(gm, tuple(inputs), Config(), device), ANALYSIS)))

    capture(model, x, judge)
    (value,) = found
    return value


@pytest.mark.parametrize("trained, needs, products", [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)])
def test_a_product_counts_once_and_once_for_each_gradient(trained, needs, products):
    model = nn.Linear(16, 8).requires_grad_(trained)
    x = torch.randn(3, 5, 16, requires_grad=needs)
    assert seconds(model, x) == pytest.approx(products * 2 * 15 * 16 * 8 / GEMM)


def test_regions_do_not_count_but_the_head_does():
    ffn = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    x = torch.randn(4, 16)
    assert seconds(ffn, x) == 0.0
    assert seconds(nn.Sequential(ffn, nn.LayerNorm(16), nn.Linear(16, 99)), x) == pytest.approx(3 * 2 * 4 * 16 * 99 / GEMM)


class Pointwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ((x * 2 + 1).tanh() - 3).view(-1)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (16,))


def test_bytes_of_the_rest_and_fusion():
    x = torch.randn(4, 16)
    size = 4 * 16 * 4
    assert seconds(Pointwise(), x, BYTES_ONLY) == pytest.approx(2 * size / DEVICE.bandwidth)  # read and written once
    assert seconds(Norm(), x, BYTES_ONLY) == pytest.approx(2 * size / DEVICE.bandwidth)
    assert seconds(Norm(), x.requires_grad_(), BYTES_ONLY) == pytest.approx(4 * size / DEVICE.bandwidth)
