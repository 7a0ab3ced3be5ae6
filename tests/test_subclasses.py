"""Tensor subclasses and opaque operators, as quantized models have them: refused where they stand, everything else is rewritten."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

import sptc
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor


class Int8(torch.Tensor):
    """Integers and a scale for each row. Knows few operators, and looks into `linear` before it is dispatched, as torchao's weights do."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype, device=integers.device)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["integers"], inner["scale"])

    def __repr__(self):
        return f"Int8({list(self.shape)})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, torch._C._nn.linear):
            x, weight, *bias = args
            return F.linear(x, weight.integers.to(x.dtype) * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            inner = [func(t) for t in (args[0].integers, args[0].scale)]
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(*inner))
        raise NotImplementedError(f"{func} on {cls.__name__}")


@torch.library.custom_op("sptc_test::opaque_linear", mutates_args=())
def opaque_linear(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.linear(x, integers.to(x.dtype) * scale)


opaque_linear.register_fake(lambda x, integers, scale: x.new_empty((*x.shape[:-1], integers.shape[0])))
opaque_linear.register_autograd(
    lambda ctx, grad: (grad @ (ctx.weight[0].to(grad.dtype) * ctx.weight[1]), None, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "weight", inputs[1:]),
)


def quantized(weight):
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class OfASubclass(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.weight = nn.Parameter(Int8(*quantized(nn.Linear(inner, outer).weight)), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight)


class Transposed(OfASubclass):
    """The subclass passes through another call; the module's integers are reached by name."""

    def forward(self, x):
        return F.linear(x, self.weight.detach())


class Opaque(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        integers, scale = quantized(nn.Linear(inner, outer).weight)
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.ops.sptc_test.opaque_linear(x, self.integers, self.scale)


class Adapted(nn.Module):
    def __init__(self, base, inner, outer):
        super().__init__()
        self.base, self.a, self.b = base(inner, outer), nn.Linear(inner, 4, bias=False), nn.Linear(4, outer, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Block(nn.Module):
    """Attention by plain projections, an FFN by quantized ones."""

    def __init__(self, base):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.up, self.down = Adapted(base, 32, 64), Adapted(base, 64, 32)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("base", [OfASubclass, Transposed, Opaque])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_attention_is_rewritten_and_the_quantized_ffn_refused(base, dynamic):
    torch.manual_seed(0)
    model, x = Block(base), torch.randn(2, 19, 32)
    want = gradients(model, model(x).square().mean())
    compiled = torch.compile(model, backend=without_inductor(**FULL, on_error="raise"), dynamic=dynamic)
    assert_gradients_close(gradients(model, compiled(x).square().mean()), want)
    regions = sptc.report(compiled).regions
    assert {(r.kind, r.status) for r in regions} == {("attention", "rewritten"), ("ffn", "refused")}
    name = "sptc_test.opaque_linear.default" if base is Opaque else "linear"
    assert any(f"is computed by {name}, a call that is kept as it is, as those on quantized weights are" in r.reason for r in regions)


@pytest.mark.parametrize("base", [OfASubclass, Opaque])
def test_prepare_and_explain(base):
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(base)), torch.randn(2, 19, 32)
    options = {"decline": "never", "attention.selector": "pq"}
    before = copy.deepcopy(dict(model.named_parameters()))
    for report in (sptc.explain(model, x, options), sptc.prepare(model, x, options)):
        assert {(r.kind, r.status) for r in report.regions} == {("attention", "rewritten"), ("ffn", "refused")}
    assert before.keys() == dict(model.named_parameters()).keys() and hasattr(model[0], "spt")


class Weight(nn.Parameter):
    """A parameter with a `__torch_function__` of its own, as those of bitsandbytes are: Dynamo calls its graph through a closure."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_a_graph_that_dynamo_wraps_once_more_has_its_report():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model[0].weight = Weight(model[0].weight.detach())
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    compiled(torch.randn(2, 5, 8)).sum().backward()
    (region,) = sptc.report(compiled).regions
    assert (region.kind, region.status) == ("ffn", "rewritten")
