"""The fixture that makes unwritten outputs visible is at work in this folder."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_uninitialized_floats_are_nan(dtype: torch.dtype) -> None:
    like = torch.ones(3, 5, dtype=dtype)
    strided = torch.empty_strided((2, 3), (3, 1), dtype=dtype)
    for tensor in (torch.empty(7, dtype=dtype), torch.empty_like(like), like.new_empty(2, 3), strided):
        assert tensor.isnan().all()


def test_uninitialized_integers_are_out_of_range() -> None:
    assert (torch.empty(7, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
