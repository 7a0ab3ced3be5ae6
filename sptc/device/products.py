"""The faster of the two libraries that multiply matrices in fp32 on a CPU, for what runs outside of Inductor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of x [..., k] and W [n, k], as `aten.linear`. Not to be differentiated, nor under an autocast that is to cast."""
    if all(_plain(t) for t in (x, weight, bias) if t is not None) and by_onednn(weight) and x.dtype == weight.dtype:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), fast(weight), bias, "none", [], "")
    return torch.ops.aten.linear.default(x, weight, bias)


def _plain(x: Tensor) -> bool:
    """Whether it is no subclass, which computes products in its own way (quantized, distributed)."""
    return type(x) in (Tensor, nn.Parameter)


def by_onednn(b: Tensor) -> bool:
    """Whether products by b are oneDNN's and not torch's own: in fp32 it was twice as fast on a processor of AMD as the MKL behind these.

    By a thin matrix, as an adapter has, both are as fast, and MKL makes no kernel for each.
    """
    return b.device.type == "cpu" and b.dtype == torch.float32 and min(b.shape) > 64 and torch.backends.mkldnn.is_available()


def fast(b: Tensor) -> Tensor:
    """The same matrix, copied if oneDNN is to multiply by it and knows no fast way for its strides."""
    if not by_onednn(b) or b.is_contiguous() or b.t().is_contiguous():
        return b
    return b.contiguous() if b.stride(1) == 1 else b.t().contiguous().t()
