"""Operators that rows which are left out may pass have values and slopes everywhere, and others are taken to have none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sptc.passes.graph.effects import written_values
from sptc.passes.graph.poles import _FINITE, may_be_infinite

OPERANDS: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "clamp": lambda x: (x, -1.0, 1.0),
    "clip": lambda x: (x, -1.0, 1.0),
    "clamp_max": lambda x: (x, 1.0),
    "clamp_min": lambda x: (x, -1.0),
    "threshold": lambda x: (x, 0.5, 0.0),
    "masked_fill": lambda x: (x, x > 1, 2.0),
    "where": lambda x: (x > 1, x, x),
    "addcmul": lambda x: (x, x, x),
    "lerp": lambda x: (x, x, x),
}


def operands(name: str, x: Tensor) -> tuple[Any, ...]:
    if name in OPERANDS:
        return OPERANDS[name](x)
    return (x, x) if {"Tensor", "other"} & set(getattr(torch.ops.aten, name).overloads()) or name in BINARY else (x,)


BINARY = ("fmax", "fmin", "maximum", "minimum", "logaddexp", "logical_and", "logical_or", "logical_xor")


@pytest.mark.parametrize("name", sorted(_FINITE))
def test_finite_everywhere(name: str) -> None:
    x = torch.tensor([-7.0, -2.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.5, 7.0], requires_grad=True)
    y = getattr(torch.ops.aten, name)(*operands(name, x))
    assert y.isfinite().all()
    if y.requires_grad:
        y.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


POLES: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "a root": (True, torch.sqrt),
    "the root of a variance and an epsilon": (False, lambda x: (x.var(-1, keepdim=True) + 1e-5).rsqrt()),
    "of a mean of squares, in fp32": (False, lambda x: (x.pow(2).float().mean(-1, keepdim=True) + 1e-6).rsqrt()),
    "of a product with itself": (False, lambda x: (x * x).sum(-1, keepdim=True).add(1e-6).log()),
    "a quotient by one and a sigmoid": (False, lambda x: x / (1 + x.sigmoid())),
    "a quotient by one and what may be minus one": (True, lambda x: x / (1 + (-(x * x).exp()))),
    "a quotient by one and a token": (True, lambda x: x / (1 + x)),
    "a quotient by a number": (False, lambda x: x / 3),
    "a quotient by what is clamped": (False, lambda x: 1 / x.abs().clamp(min=1e-3)),
    "a quotient by what is clamped and then written to": (True, lambda x: 1 / x.abs().clamp(min=1e-3).sub_(1e-3)),
    "one by a copy that is written to": (True, lambda x: _written(x)),
    "a square": (False, lambda x: x.pow(2)),
    "a root by its exponent": (True, lambda x: x.pow(0.5)),
    "float_power": (True, lambda x: torch.float_power(x, 0.5)),
    "a power of two": (False, lambda x: 2.0 ** x.sigmoid()),
    "hypot": (True, lambda x: torch.hypot(x, x)),
    "erfinv, of which nothing is known": (True, torch.erfinv),
    "log1p of what may be less": (True, torch.log1p),
    "log1p of a square": (False, lambda x: torch.log1p(x * x)),
    "a power of 1.5 of what may be negative": (True, lambda x: (x - 2) ** 1.5),
    "a power of 1.5 of a square": (False, lambda x: x.square() ** 1.5),
    "asin": (True, torch.asin),
    "a quotient by an integer of what is clamped": (True, lambda x: 1 / x.abs().clamp(min=0.5).long()),
    "an epsilon that is nothing in fp16": (True, lambda x: (x.half().square() + 1e-8).rsqrt()),
    "an epsilon whose slope is too much in fp16": (True, lambda x: (x.half().square() + 1e-5).rsqrt()),
    "an epsilon in bf16": (False, lambda x: (x.bfloat16().square() + 1e-5).rsqrt()),
    "an epsilon whose slope is too much in fp32": (True, lambda x: (x.square() + 1e-30).rsqrt()),
    "a layer norm": (False, lambda x: F.layer_norm(x, (4,))),
    "a layer norm without an epsilon": (True, lambda x: F.layer_norm(x, (4,), eps=0.0)),
}


def _written(x: Tensor) -> Tensor:
    y = (x.square() + 1).clone()
    y[0] = 0.0
    return 1 / y


@pytest.mark.parametrize("name", POLES)
def test_poles(name: str) -> None:
    want, function = POLES[name]
    gm = make_fx(function, pre_dispatch=True)(torch.rand(2, 4))
    computed = {node for node in gm.graph.nodes if node.op in ("placeholder", "call_function")}
    written = written_values(gm.graph)
    found = [node for node in computed if node.op == "call_function" and may_be_infinite(node, computed, written)]
    assert bool(found) == want, (found, inspect.getsource(function))
