"""What a found attention region computes, evaluated from its fields alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sptc.ir import expression, predicate
from sptc.ir.region import AttentionRegion, Mask


def allowed(mask: Mask, values: Mapping[Node, Any], sizes: tuple[int, int, int, int]) -> Tensor:
    """Where predicate and boolean of `mask` let attend: bool [b, h, n, m]."""
    positions = [torch.arange(size).view([-1 if i == axis else 1 for i in range(4)]) for axis, size in enumerate(sizes)]
    tensors = [values[node] for node in mask.tensors]
    numbers = [size if isinstance(size, int) else values[size] for size in mask.sizes]
    result = predicate.parse(mask.predicate).evaluate(*positions, tensors, numbers)
    if mask.boolean is not None:
        result = result & values[mask.boolean]
    return result.expand(sizes)


def compute(region: AttentionRegion, values: Mapping[Node, Any]) -> tuple[Tensor, Tensor]:
    """(y in float64, rows that see a key) of the region."""
    q, k, v = (values[node].double() for node in (region.q, region.k, region.v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = expression.evaluate(expression.parse(region.transform), region.scale * q @ k.mT)
    seen = allowed(region.mask, values, tuple(scores.shape))
    if region.mask.bias is not None:
        bias = values[region.mask.bias]
        scores = scores + bias
        seen = seen & (bias > torch.finfo(bias.dtype).min)
    scores = scores.masked_fill(~seen, -torch.inf)
    if region.sink is not None:
        scores = torch.cat((scores, values[region.sink].double()), -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v, seen.any(-1)
