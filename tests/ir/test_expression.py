"""The grammar of smooth functions of one number, lifting ATen calls into it, and values and derivatives beside torch's."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sptc.ir.expression import FUNCTIONS, U0, ExpressionError, canonical, derivative, evaluate, lift, parse

_NUMBERS = st.one_of(st.integers(-5, 5), st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-3))


def texts() -> st.SearchStrategy[str]:
    """Random texts of the grammar."""

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner),
            st.builds("({} * {!r})".format, inner, _NUMBERS),
            st.builds("({} / {!r})".format, inner, _NUMBERS.filter(bool)),
            st.builds("-{}".format, inner),
            st.builds("({})**{!r}".format, inner, st.sampled_from([2, 3, -1, 0.5, 2.5])),
            st.builds("{}({})".format, st.sampled_from(sorted(FUNCTIONS)), inner),
        )

    return st.recursive(st.just("u0"), grow, max_leaves=6)


@settings(max_examples=200, deadline=None)
@example("((u0 + (u0 * u0)) / (u0 + u0))")  # a number times a sum, with a third factor
@given(texts())
def test_canonical_text_is_a_fixed_point(text):
    try:
        function = parse(text)
    except ExpressionError:  # u0 that cancels, or a power of a number
        return
    again = parse(canonical(function))
    assert again == function and canonical(again) == canonical(function)


@pytest.mark.parametrize("one, other", [("u0*0.5", "u0/2"), ("1.0 + u0", "u0 + 1"), ("(u0*u0)*u0", "u0**3.0")])
def test_equal_functions_have_equal_texts(one, other):
    assert canonical(parse(one)) == canonical(parse(other))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "u0.real",
        "u0[0]",
        "lambda: u0",
        "tanh(x=u0)",
        "foo(u0)",
        "u0 if u0 else u0",
        "u0 ** u0",
        "2 ** u0",
        "u0 ** 1000",
        "u1",
        "3.0",
        "u0 - u0",
        "1e999*u0",
        "u0/0",
        "u0 + True",
        "u0 + 1j",
        "tanh(u0, 1)",
        "tanh()",
        "u0 +",
        "",
        "u0 + tanh(u0 - u0)",
        "u0 < 1",
    ],
)
def test_texts_outside_the_grammar_are_errors(text):
    with pytest.raises(ExpressionError):
        parse(text)


@pytest.mark.parametrize(
    "name, args, kwargs, text",
    [
        ("aten.tanh.default", [U0], {}, "tanh(u0)"),
        ("aten.tanh_.default", [U0], {}, "tanh(u0)"),
        ("aten.add.Tensor", [U0, U0], {"alpha": 2}, "3*u0"),
        ("aten.add.Scalar", [U0, 1.5], {}, "u0 + 1.5"),
        ("aten.rsub.Scalar", [U0, 1, 2], {}, "1 - 2*u0"),
        ("aten.div.Scalar", [U0, 4], {}, "0.25*u0"),
        ("aten.pow.Tensor_Scalar", [U0, 3.0], {}, "u0**3"),
        ("aten.square.default", [U0], {}, "u0**2"),
    ],
)
def test_lift(name, args, kwargs, text):
    assert canonical(lift(name, args, kwargs)) == canonical(parse(text))


@pytest.mark.parametrize(
    "name, args, kwargs",
    [
        ("aten.tanh.out", [U0], {}),
        ("aten.sort.default", [U0], {}),
        ("aten.relu.default", [U0], {}),
        ("prims.add.default", [U0, U0], {}),
        ("aten.pow.Tensor_Tensor", [U0, U0], {}),
        ("aten.div.Tensor_mode", [U0, 2], {"rounding_mode": "floor"}),
        ("aten.mul.Scalar", [U0, float("inf")], {}),
        ("aten.div.Scalar", [U0, 0], {}),
        ("aten.tanh.default", [U0, U0], {}),
        ("aten.mul.Tensor", [U0, object()], {}),
        ("aten.pow.Scalar", [2, U0], {}),
        ("aten.detach.default", [U0], {}),
    ],
)
def test_what_is_not_lifted(name, args, kwargs):
    assert lift(name, args, kwargs) is None


@pytest.mark.parametrize(
    "text", [*(f"{name}(u0)" for name in FUNCTIONS), "3*tanh(u0/3)", "u0**2.5", "exp(3*u0)*u0", "(u0*tanh(u0))**2/(1 + u0)"]
)
def test_values_and_derivatives_are_torchs(text):
    function = parse(text)
    u = (torch.rand(50, dtype=torch.float64) + 0.1).requires_grad_()
    value = eval(text, {**{name: getattr(torch, name) for name in FUNCTIONS}, "u0": u})
    (slope,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close(evaluate(function, u), value)
    torch.testing.assert_close(evaluate(derivative(function), u), slope)


def test_derivative_of_a_power_does_not_divide_by_its_base():
    # sympy's own rule gives tanh(u0)**2.5 / tanh(u0), which is 0/0 at 0.
    assert evaluate(derivative(parse("tanh(u0)**2.5")), torch.zeros(1)) == 0
