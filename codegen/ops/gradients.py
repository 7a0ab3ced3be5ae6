"""Ops by which a value that was computed in one way has the gradient of another way to compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_lib = torch.library.Library("sptc", "FRAGMENT")
_lib.define("with_gradient_of(Tensor value, Tensor stand_in) -> Tensor")
_lib.define("keep(Tensor value) -> Tensor")
_lib.define("after(Tensor value, Tensor[] others) -> Tensor")


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.clone()  # a view would be none that users may write to

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def with_gradient_of(value: Tensor, stand_in: Tensor) -> Tensor:
    """`value`, whose gradient is that of `stand_in`, of the same shape and dtype.

    It is traced through: what computes `stand_in` is then dead in the forward pass but for what its gradient is computed from.
    """
    applied: Tensor = _WithGradientOf.apply(value, stand_in)  # type: ignore[no-untyped-call]
    return applied


def keep(value: Tensor) -> Tensor:
    """`value`, which a checkpoint keeps for backward and does not compute again (`passes/rewrite/forms.py`). It has no gradient."""
    return value.clone()


def after(value: Tensor, others: Sequence[Tensor]) -> Tensor:
    """`value`, once `others` are computed: what backward alone reads of them is then computed in the forward pass, and kept."""
    return value.clone()


_lib.impl("with_gradient_of", with_gradient_of, "CompositeImplicitAutograd")
for _name, _function in (("keep", keep), ("after", after)):
    for _key in ("CPU", "CUDA"):
        _lib.impl(_name, _function, _key)
    torch.library.register_fake(f"sptc::{_name}", _function, lib=_lib)
