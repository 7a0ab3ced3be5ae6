"""The interpreter of runs that measure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sptc.plans.beside import Beside, Mixed


class Called(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def product() -> fx.GraphModule:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output(graph.call_function(torch.ops.aten.linear.default, (x, weight)))
    return fx.GraphModule(nn.Module(), graph)


def run(x: Tensor, weight: Tensor) -> tuple[Tensor, list[str]]:
    with Called() as called:
        y = Mixed(product(), Beside({}, {}), {}).run(x, weight)
    return y, called.names


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_products_are_of_the_faster_library() -> None:
    x, weight = torch.randn(4, 128), torch.randn(128, 128)
    with torch.no_grad():
        y, names = run(x, weight)
    torch.testing.assert_close(y, x @ weight.t())
    assert names == ["mkldnn._linear_pointwise.default"]


def test_autocast_casts_products() -> None:
    x, weight = torch.randn(4, 128), torch.randn(128, 128)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = run(x, weight)
    assert y.dtype == torch.bfloat16


def test_products_with_gradients_are_differentiated() -> None:
    x, weight = torch.randn(4, 128), torch.randn(128, 128, requires_grad=True)
    y, _ = run(x, weight)
    y.sum().backward()
    assert weight.grad is not None
