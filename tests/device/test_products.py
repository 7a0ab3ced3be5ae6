"""Products in fp32 by the faster library are torch's own, whatever the shapes and strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sptc.device.products import linear

WEIGHTS = {
    "rows": torch.randn(70, 128),
    "transposed": torch.randn(128, 70).t(),
    "every second row": torch.randn(140, 128)[::2],
    "every second column": torch.randn(70, 256)[:, ::2],
    "thin": torch.randn(16, 128),
}


@pytest.mark.parametrize("shape", [(128,), (0, 128), (3, 128), (2, 3, 128), (2, 0, 128), (2, 1, 5, 128)], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_torch(shape: tuple[int, ...], weight: Tensor, dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), weight.to(dtype)
    for bias in (None, torch.randn(weight.shape[0]).to(dtype)):
        torch.testing.assert_close(linear(x, weight, bias), nn.functional.linear(x, weight, bias))


class Doubled(Tensor):
    """Stands for a quantized or distributed weight: its products are other than its numbers say."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        return result * 2 if function is torch.ops.aten.linear.default else result


def test_subclass_multiplies_in_its_own_way() -> None:
    x, weight = torch.randn(5, 128), torch.randn(128, 128)
    torch.testing.assert_close(linear(x, weight.as_subclass(Doubled)).as_subclass(Tensor), 2 * (x @ weight.t()))
