"""Autocast where a region stands: the sparse form is written, and computes, as the dense one does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sptc
from sptc.passes.graph.frame import graphs
from sptc.passes.graph.modes import autocast_dtype
from sptc.passes.graph.pattern import op
from tests.capture import capture
from tests.models.compiled import FULL, gradients, without_inductor


class Ffn(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Inside(Ffn):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class InsideACheckpoint(Inside):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class AroundACheckpoint(Ffn):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("place", [Inside, InsideACheckpoint, AroundACheckpoint])
@pytest.mark.parametrize(
    ("weights", "inputs"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=["bf16-weights", "bf16-inputs"]
)
def test_operands_of_two_dtypes(place, weights, inputs):
    torch.manual_seed(0)
    dense, x = place().to(weights), torch.randn(3, 9, 16).to(inputs)
    model, exact = copy.deepcopy(dense), copy.deepcopy(dense).double()
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    want, got = dense(x), compiled(x)
    assert got.dtype == want.dtype
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]
    truth = Ffn.forward(exact, x.double())
    # The sparse form rounds to bf16 before it adds the bias of the down projection: one rounding more.
    assert (got - truth).abs().max() <= 3 * (want - truth).abs().max()
    wanted, true = gradients(dense, want.float().square().mean()), gradients(exact, truth.square().mean())
    for name, grad in gradients(model, got.float().square().mean()).items():
        assert grad.dtype == wanted[name].dtype
        assert (grad - true[name]).abs().max() <= 3 * (wanted[name] - true[name]).abs().max(), name


def test_the_innermost_block_counts_and_bodies_know_what_is_around_them():
    def program(x):
        def body(x):
            x = x + 1
            with torch.autocast("cpu", enabled=False):
                x = x + 2
            return x + 3

        x = x + 4
        with torch.autocast("cpu", torch.float16):
            with torch.autocast("cpu", torch.bfloat16):
                x = checkpoint(body, x + 5, use_reentrant=False)
            return x + 6

    ((gm, _),) = capture(program, {"x": torch.ones(2, 8)})
    adds = [node for graph in graphs(gm) for node in graph.graph.nodes if op(node) == "aten.add.Tensor"]
    off, half = None, torch.bfloat16
    assert {n.args[1]: autocast_dtype(n, "cpu") for n in adds} == {1: half, 2: off, 3: half, 4: off, 5: half, 6: torch.float16}
