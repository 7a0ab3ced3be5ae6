"""Emitted activations, interpreted, against torch's own values and gradients."""

from __future__ import annotations

import ast
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sptc.codegen.expr import BACKWARD
from sptc.codegen.spec import KernelSpec
from sptc.codegen.specialize import TEMPLATES
from sptc.codegen.triton_expr import ACTIVATION_HOOKS, activation_source
from sptc.expression import FUNCTIONS, SYMBOLS, ExpressionError, canonical, lift, parse
from tests.codegen.test_expr import NAMESPACE, OPS, POINTS, SPELLED, check_like_torch, points, random_texts

aten, inf = torch.ops.aten, math.inf
PROBE = """
@triton.jit
def probe(grad_ptr, value_ptr, both_ptr, U: many("UPS"), G: many("UPS"), H: many("UPS"), n, UPS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    live = at < n
    grad = tl.load(grad_ptr + at, mask=live, other=0.0)
    for i in unroll(UPS):
        u[i] = tl.load(U[i] + at, mask=live, other=1.0)
    tl.store(value_ptr + at, activation(*u[:UPS]), mask=live)
    g[:UPS] = activation_backward(grad, *u[:UPS])
    value, h[:UPS] = activation_and_backward(grad, *u[:UPS])
    tl.store(both_ptr + at, value, mask=live)
    for i in unroll(UPS):
        tl.store(G[i] + at, g[i], mask=live)
        tl.store(H[i] + at, h[i], mask=live)
"""


class Emitted:
    """An activation as its emitted code computes it."""

    def __init__(self, text: str) -> None:
        self.arity = parse(text).arity
        self.text = text

    def forward(self, us):
        return self._run(us, torch.zeros_like(us[0]))[0]

    def backward(self, us, grad):
        return self._run(us, grad)[1]

    def _run(self, us, grad):
        from sptc.codegen.load import load

        n = grad.numel()
        spec = KernelSpec.of("probe", {"UPS": self.arity, "BLOCK": 1 << (n - 1).bit_length()}, {"activation": self.text})
        value, both = torch.empty(n), torch.empty(n)
        grads, others = ([torch.empty(n) for _ in us] for _ in range(2))
        arguments = {"grad_ptr": grad, "value_ptr": value, "both_ptr": both, "n": n}
        for i, operands in enumerate(zip(us, grads, others, strict=True)):
            arguments |= {f"{name}_{i}": operand for name, operand in zip("UGH", operands, strict=True)}
        load(spec, interpret=True).launch((1,), arguments, torch.device("cpu"))
        for one, other in zip([value, *grads], [both, *others], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        return value, grads


@pytest.fixture(autouse=True)
def probe(template):
    template("probe", PROBE)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of exponentials that overflow to the right infinity


@pytest.mark.parametrize("name, args", OPS, ids=[f"{name[5:]}{args or ''}" for name, args in OPS])
def test_each_op_is_torchs_own(name, args):
    _, base, overload = name.split(".")
    text = canonical(lift(name, [SYMBOLS[0], *args], {}))
    u = points()
    if base == "pow":
        u = u[u != -inf]  # C's pow gives inf there; roots and logarithms of negative numbers are nan
    check_like_torch(Emitted(text), lambda u: getattr(getattr(aten, base), overload)(u, *args), [u], rtol=3e-6)


@pytest.mark.parametrize("base", ["maximum", "minimum", "mul", "div", "sub"])
def test_each_binary_op_is_torchs_own(base):
    text = canonical(lift(f"aten.{base}.{'default' if 'imum' in base else 'Tensor'}", list(SYMBOLS[:2]), {}))
    a, b = torch.tensor(POINTS).repeat_interleave(len(POINTS)), torch.tensor(POINTS).repeat(len(POINTS))
    check_like_torch(Emitted(text), getattr(torch, base), [a, b])


@pytest.mark.parametrize("text, function, op", SPELLED, ids=[case[0] for case in SPELLED])
def test_spelled_out_activations(text, function, op):
    emitted = Emitted(parse(text).text)
    us = [points(), points().flip(0)][: emitted.arity]
    check_like_torch(emitted, function, us, rtol=1e-5)
    if op in ("gelu", "gelu_tanh", "mish", "silu"):
        assert f"{op}(u0)" in activation_source(emitted.text, "activation").replace("silu(1.702 * u0)", "silu(u0)")


@pytest.mark.parametrize(
    "name", [name for name, function in FUNCTIONS.items() if 1 in function.nargs and name not in ("sqrt", "rsqrt", "exp", "absolute")]
)
def test_stable_and_accurate_near_zero_and_far_out(name):
    """Relative accuracy where the value is small, and no NaN for finite inputs."""
    u = torch.cat([torch.logspace(-7, math.log10(60), 60), -torch.logspace(-7, math.log10(3), 40)])
    function = NAMESPACE[name]
    value = Emitted(f"{name}(u0)").forward([u])
    torch.testing.assert_close(value, function(u.double()).float(), rtol=5e-5, atol=1e-30)
    far = torch.tensor([1e4, -1e4, 1e15, -1e15])
    torch.testing.assert_close(Emitted(f"{name}(u0)").forward([far]), function(far))
    leaf = far.double().requires_grad_()
    function(leaf).sum().backward()
    torch.testing.assert_close(Emitted(f"{name}(u0)").backward([far[:2]], torch.ones(2))[0], leaf.grad[:2].float())


def test_nan_stays_nan():
    names = [name for name, function in FUNCTIONS.items() if 1 in function.nargs]
    for name in names:
        assert Emitted(f"{name}(u0)").forward([torch.tensor([math.nan, 1.0])]).isnan().tolist() == [True, False], name
    pair = [torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan])]
    assert Emitted("maximum(u0, u1)").forward(pair).isnan().all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random_texts())
def test_random_expressions_against_autograd(text):
    try:
        emitted = Emitted(parse(text).text)
    except ExpressionError:  # the u's cancel, or only u1 is read
        return
    generator = torch.Generator().manual_seed(1)
    us = [torch.rand(50, dtype=torch.float64, generator=generator).mul(4).sub(2).float() for _ in range(emitted.arity)]
    grad = torch.linspace(-2, 2, 50)
    leaves = [u.double().requires_grad_() for u in us]
    value = eval(text, NAMESPACE, {"u0": leaves[0], "u1": leaves[-1]})
    wants = torch.autograd.grad(value, leaves, grad.double(), allow_unused=True)
    for got, want in zip([emitted.forward(us), *emitted.backward(us, grad)], [value.detach(), *wants], strict=True):
        want = torch.zeros(50) if want is None else want.float()
        scale = max(want.abs().max().item(), 1.0)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-4 * scale)


def test_common_subexpressions_are_written_once():
    source = activation_source(parse("0.5*u0*(1 + tanh(0.7978845608028654*(u0 + 0.044715*u0**3)))*u1").text, "activation_and_backward")
    code = source[source.rindex('"""') :]
    assert len(re.findall(r"\bgelu_tanh\(", code)) == 1 and len(re.findall(r"\bgelu_tanh_backward\(", code)) == 1
    source = activation_source("u0**12 + sigmoid(u0)*sigmoid(u0)*u0**9", "activation")
    assert source.count("sigmoid(u0)\n") == 1 and source.count("u0 * u0") == 1


@pytest.mark.parametrize("name", ACTIVATION_HOOKS)
def test_source_is_readable_python(name):
    for text, _, _ in SPELLED:
        source = activation_source(parse(text).text, name)
        [function] = ast.parse(source).body
        assert ast.get_docstring(function) and max(map(len, source.splitlines())) <= 110


def test_every_step_of_an_activation_has_a_function():
    defined = {node.name for node in ast.parse((TEMPLATES / "elementary.py").read_text()).body if isinstance(node, ast.FunctionDef)}
    assert {*FUNCTIONS, *BACKWARD, "power"} <= defined
