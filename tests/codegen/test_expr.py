"""Activations in C++ against torch's own forward and autograd, and the programs that they are written from."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sptc.codegen.cpu import native
from sptc.codegen.cpu.activation import activation_source, compile_activation
from sptc.codegen.expr import BACKWARD, program
from sptc.expression import FUNCTIONS, SYMBOLS, ExpressionError, canonical, lift, parse

aten, inf, nan = torch.ops.aten, math.inf, math.nan
NATIVE = Path(native.__file__).parent
NAMESPACE = {
    **{
        name: getattr(torch, name)
        for name in ("relu", "sigmoid", "tanh", "exp", "erf", "sqrt", "rsqrt", "maximum", "clamp", "clamp_min", "clamp_max")
    },
    **{
        name: getattr(torch.nn.functional, name)
        for name in ("silu", "mish", "gelu", "softplus", "hardswish", "hardsigmoid", "leaky_relu", "hardtanh")
    },
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "elu": aten.elu,
    "absolute": torch.abs,
}
POINTS = [0.0, -0.0, 100.0, -100.0, inf, -inf, 1.0, -1.0, 3.0, -3.0, 6.0, 20.0, 20.5, 0.5, -0.5, 1e-6, 2.7]


def points() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.tensor(POINTS), torch.randn(200) * 3])


class Compiled:
    """An activation as a CPU computes it, on flat tensors."""

    def __init__(self, text: str) -> None:
        self.text, self.arity = text, parse(text).arity

    def forward(self, us):
        out = torch.full_like(us[0], nan)
        compile_activation(self.text, out.dtype).forward([u[None] for u in us], None, out[None])
        return out

    def backward(self, us, grad):
        grads = [grad, *(torch.full_like(grad, nan) for _ in us[1:])]
        value, expected = torch.full_like(grad, nan), self.forward(us)
        compile_activation(self.text, grad.dtype).backward([u[None] for u in us], None, [g[None] for g in grads], value[None], None)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-30, equal_nan=True)
        return grads


def check_like_torch(compiled, function, us, rtol=2e-6):
    """Values and gradients of `compiled` at `us` equal those of `function` wherever torch's own are no nan."""
    leaves = [u.clone().requires_grad_() for u in us]
    expected = function(*leaves)
    grad = torch.linspace(-2, 2, us[0].numel(), dtype=us[0].dtype)
    expected_grads = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    before = [u.clone() for u in us]
    value = compiled.forward(us)
    grads = compiled.backward(us, grad.clone())
    for u, was in zip(us, before, strict=True):
        torch.testing.assert_close(u, was, rtol=0, atol=0, equal_nan=True)
        assert value.data_ptr() != u.data_ptr()
    for got, want in zip([value, *grads], [expected.detach(), *expected_grads], strict=True):
        want = torch.zeros_like(got) if want is None else want
        sure = ~want.isnan()
        scale = want[want.isfinite()].abs().max().item()
        torch.testing.assert_close(got[sure], want[sure], rtol=rtol, atol=rtol * min(scale, 1.0))


OPS = [
    ("aten.relu.default", ()),
    ("aten.gelu.default", ()),
    ("aten.silu.default", ()),
    ("aten.mish.default", ()),
    ("aten.sigmoid.default", ()),
    ("aten.tanh.default", ()),
    ("aten.exp.default", ()),
    ("aten.erf.default", ()),
    ("aten.sqrt.default", ()),
    ("aten.rsqrt.default", ()),
    ("aten.abs.default", ()),
    ("aten.hardswish.default", ()),
    ("aten.hardsigmoid.default", ()),
    ("aten.relu6.default", ()),
    ("aten.selu.default", ()),
    ("aten.elu.default", ()),
    ("aten.elu.default", (0.7, 1.3, 2.0)),
    ("aten.celu.default", (2.0,)),
    ("aten.leaky_relu.default", (0.2,)),
    ("aten.leaky_relu.default", ()),
    ("aten.hardtanh.default", ()),
    ("aten.hardtanh.default", (-3.0, 0.5)),
    ("aten.softplus.default", ()),
    ("aten.softplus.default", (2.0, 6.0)),
    ("aten.clamp.default", (-1.0, 3.0)),
    ("aten.clamp.default", (None, 3)),
    ("aten.clamp_min.default", (0.5,)),
    ("aten.clamp_max.default", (-0.5,)),
    ("aten.square.default", ()),
    ("aten.neg.default", ()),
    ("aten.reciprocal.default", ()),
    ("aten.pow.Tensor_Scalar", (3,)),
    ("aten.pow.Tensor_Scalar", (2.5,)),
    ("aten.pow.Tensor_Scalar", (0.5,)),
    ("aten.pow.Tensor_Scalar", (2.3,)),
    ("aten.add.Scalar", (1.5, 2)),
    ("aten.rsub.Scalar", (1, 2)),
    ("aten.mul.Scalar", (-0.3,)),
    ("aten.div.Scalar", (3,)),
]


@pytest.mark.parametrize("name, args", OPS, ids=[f"{name[5:]}{args or ''}" for name, args in OPS])
def test_each_op_is_torchs_own(name, args):
    _, base, overload = name.split(".")
    text = canonical(lift(name, [SYMBOLS[0], *args], {}))
    u = points()
    if args == (2.5,):
        u = u[u != -inf]  # C's pow gives inf there; roots of negative numbers are nan
    check_like_torch(Compiled(text), lambda u: getattr(getattr(aten, base), overload)(u, *args), [u])


@pytest.mark.parametrize("base", ["maximum", "minimum", "mul", "div", "sub"])
def test_each_binary_op_is_torchs_own(base):
    text = canonical(lift(f"aten.{base}.{'default' if 'imum' in base else 'Tensor'}", list(SYMBOLS[:2]), {}))
    a, b = points().repeat_interleave(len(POINTS)), torch.tensor(POINTS).repeat(points().numel())
    check_like_torch(Compiled(text), getattr(torch, base), [a, b])


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


SPELLED = [
    ("0.5*u0*(1 + tanh(0.7978845608028654*(u0 + 0.044715*u0**3)))", new_gelu, "gelu_tanh"),
    ("u0*0.5*(1 + tanh(u0*0.7978845608*(1 + 0.044715*u0*u0)))", new_gelu, None),
    ("u0*(1 + erf(u0/1.4142135623730951))*0.5", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) * 0.5, "gelu"),
    ("u0*sigmoid(1.702*u0)", lambda x: x * torch.sigmoid(1.702 * x), "silu"),
    ("u0*tanh(softplus(u0, 1, 20))", lambda x: x * torch.tanh(torch.nn.functional.softplus(x)), "mish"),
    ("u0*sigmoid(u0)*u1", lambda x, y: x * torch.sigmoid(x) * y, "silu"),
    ("0.5*u0*(1 + tanh(0.7978845608028654*(u0 + 0.044715*u0**3)))*u1", lambda x, y: new_gelu(x) * y, "gelu_tanh"),
    ("relu(u0)**2", lambda x: torch.relu(x) ** 2, "relu"),
    ("silu(u0)*u1", lambda x, y: torch.nn.functional.silu(x) * y, "silu"),
    ("u0*(clamp(u0 + 3, 0, 6)/6)", lambda x: x * torch.clamp(x + 3, 0, 6) / 6, "clamp"),
    ("u0/(1 + exp(-u0))", lambda x: x / (1 + torch.exp(-x)), "exp"),
    ("u0 + u1", lambda x, y: x + y, "add"),
    ("u0", lambda x: x * 1, None),
]


@pytest.mark.parametrize("text, function, op", SPELLED, ids=[case[0] for case in SPELLED])
def test_spelled_out_activations(text, function, op):
    compiled = Compiled(parse(text).text)
    us = [points(), points().flip(0)][: compiled.arity]
    if op == "gelu":
        us = [u[u != inf] for u in us]  # aten.gelu(inf) is nan on a CPU
    # erf and tanh near -1 cancel in "1 + ...": torch's own eight ops are off by an ulp of 1 there.
    check_like_torch(compiled, function, us, rtol=1e-5)
    assert op is None or op in str(program(compiled.text, value=True))
    if op in ("gelu_tanh", "gelu", "mish"):
        assert len(program(compiled.text, value=True).steps) == compiled.arity


def test_near_misses_are_not_recognized():
    for text in (
        "0.5*u0*(1 + tanh(0.79*(u0 + 0.044715*u0**3)))",
        "u0*(1 + erf(u0))",
        "u0*(2 + erf(0.70710678118654752*u0))",
        "u0*tanh(softplus(u0, 2, 20))",
    ):
        steps = [step.op for step in program(parse(text).text, value=True).steps]
        assert not {"gelu", "gelu_tanh", "mish"} & set(steps)


def random_texts() -> st.SearchStrategy[str]:
    """Expressions that stay tame on [-2, 2], so that fp64 can decide."""

    def grow(inner):
        return st.one_of(
            st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner),
            st.builds("({} {} {!r})".format, inner, st.sampled_from("+*"), st.sampled_from([0.5, -2, 1.702, 3, 0.044715])),
            st.builds("({})**{}".format, inner, st.sampled_from([2, 3])),
            st.builds("{}/(1 + ({})**2)".format, inner, inner),
            st.builds(
                "{}({})".format,
                st.sampled_from(["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "mish", "erf", "hardswish", "absolute"]),
                inner,
            ),
            st.builds("maximum({}, {})".format, inner, inner),
            st.builds("clamp({}, -0.5, 1.5)".format, inner),
            st.builds("elu({}, 1.5, 1, 1)".format, inner),
        )

    return st.recursive(st.sampled_from(["u0", "u1"]), grow, max_leaves=6)


@settings(max_examples=60, deadline=None, derandomize=True)  # each is compiled, and kept in the cache
@given(random_texts())
def test_random_expressions_against_autograd(text):
    try:
        compiled = Compiled(parse(text).text)
    except ExpressionError:  # the u's cancel, or only u1 is read
        return
    generator = torch.Generator().manual_seed(1)
    us = [torch.rand(50, dtype=torch.float64, generator=generator) * 4 - 2 for _ in range(compiled.arity)]
    check_like_torch(compiled, lambda *leaves: eval(text, NAMESPACE, {"u0": leaves[0], "u1": leaves[-1]}), us, rtol=1e-8)


UNARY = [name for name, function in FUNCTIONS.items() if 1 in function.nargs]


SMOOTH = {
    **{f"{name}(u0)": NAMESPACE[name] for name in UNARY if name not in ("rsqrt", "sqrt", "absolute")},
    "softplus(u0, 1, 20)": torch.nn.functional.softplus,
    "elu(u0, 1, 1, 1)": torch.nn.functional.elu,
}


@pytest.mark.parametrize("text", SMOOTH)
def test_accurate_near_zero_and_far_out(text):
    """Relative accuracy where the value is small, in fp32; slopes are sums of terms of the order of 1."""
    u = torch.cat([torch.logspace(-7, math.log10(60), 60), -torch.logspace(-7, math.log10(3), 40)])
    leaf = u.double().requires_grad_()
    value = SMOOTH[text](leaf)
    value.sum().backward()
    torch.testing.assert_close(Compiled(text).forward([u]), value.detach().float(), rtol=2e-6, atol=1e-30)
    slope = Compiled(text).backward([u], torch.ones_like(u))[0]
    torch.testing.assert_close(slope, leaf.grad.float(), rtol=2e-6, atol=3e-7)


def test_nan_stays_nan():
    for name in UNARY:
        assert Compiled(f"{name}(u0)").forward([torch.tensor([nan, 1.0])]).isnan().tolist() == [True, False], name
    pair = [torch.tensor([nan, 1.0]), torch.tensor([1.0, nan])]
    assert Compiled("maximum(u0, u1)").forward(pair).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 16, 21, 64])
def test_scale_and_its_gradient_come_out_of_the_same_pass(dtype, width):
    """Rows of any width, apart in memory, among numbers that must not get in."""
    torch.manual_seed(0)
    memory = torch.full((2, 7, width + 3), nan, dtype=dtype)
    us = memory[:, :, :width].normal_().unbind(0)
    scale, grad = torch.rand(7, dtype=dtype), torch.randn(7, width, dtype=dtype)
    leaves = [u.clone().requires_grad_() for u in us]
    s = scale.clone().requires_grad_()
    torch.nn.functional.silu(leaves[0]).mul(leaves[1]).mul(s[:, None]).backward(grad)
    activation = compile_activation("u1*silu(u0)", dtype)
    value, got_scale = torch.full((7, width), nan, dtype=dtype), torch.full((7,), nan, dtype=dtype)
    activation.forward(us, scale, value)
    torch.testing.assert_close(value, torch.nn.functional.silu(us[0]) * us[1] * scale[:, None])
    grads = [grad.clone(), torch.full_like(grad, nan)]
    activation.backward(us, scale, grads, value, got_scale)
    torch.testing.assert_close(value, torch.nn.functional.silu(us[0]) * us[1])
    for got, want in zip([*grads, got_scale], [*(leaf.grad for leaf in leaves), s.grad], strict=True):
        torch.testing.assert_close(got, want)


def test_every_step_has_a_function_in_cpp():
    header = (NATIVE / "elementary.h").read_text()
    defined = set(re.findall(r"static inline Vector (\w+)\(", header))
    assert {*FUNCTIONS, *BACKWARD, "power"} <= defined


def test_source_reads_like_the_activation():
    source = activation_source("u1*silu(u0)")
    assert "// u1*silu(u0)" in source and source.count("silu(u0)") == 3  # the title, forward and backward
