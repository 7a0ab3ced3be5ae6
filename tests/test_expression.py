"""The grammar of activations, and lifting ATen calls into it. tests/codegen/test_expr.py compares values with torch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sptc.expression import FUNCTIONS, SYMBOLS, ExpressionError, canonical, derivative, lift, parse

u0, u1 = SYMBOLS[:2]
_PARAMETERS = {
    "softplus": "1, 20",
    "elu": "1.5, 1, 0.5",
    "leaky_relu": "0.01",
    "hardtanh": "-1, 1",
    "clamp": "-0.5, 2",
    "clamp_min": "-1",
    "clamp_max": "0.3",
}
_NUMBERS = st.one_of(st.integers(-5, 5), st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-3))


def texts() -> st.SearchStrategy[str]:
    """Random texts of the grammar over u0 and u1."""

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        unary = sorted(set(FUNCTIONS) - set(_PARAMETERS) - {"maximum"})
        return st.one_of(
            st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner),
            st.builds("({} * {!r})".format, inner, _NUMBERS),
            st.builds("({} / {!r})".format, inner, _NUMBERS.filter(bool)),
            st.builds("-{}".format, inner),
            st.builds("({})**{!r}".format, inner, st.sampled_from([2, 3, -1, 0.5, 2.5])),
            st.builds("{}({})".format, st.sampled_from(unary), inner),
            st.builds("maximum({}, {})".format, inner, inner),
            st.builds(lambda name, x: f"{name}({x}, {_PARAMETERS[name]})", st.sampled_from(sorted(_PARAMETERS)), inner),
        )

    return st.recursive(st.sampled_from(["u0", "u1"]), grow, max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(texts())
def test_canonical_text_is_a_fixed_point(text):
    try:
        activation = parse(text)
    except ExpressionError:  # u's that cancel, or a power of a number
        return
    again = parse(activation.text)
    assert again.text == activation.text == canonical(activation.expression)
    assert again.expression == activation.expression


@pytest.mark.parametrize(
    "one, other", [("u0*0.5", "u0/2"), ("1.0 + u0", "u0 + 1"), ("u1*silu(u0)", "silu(u0)*u1"), ("(u0*u0)*u0", "u0**3.0")]
)
def test_equal_activations_have_equal_texts(one, other):
    assert parse(one).text == parse(other).text
    assert parse(one) == parse(other)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "u0.real",
        "u0[0]",
        "lambda: u0",
        "relu(x=u0)",
        "foo(u0)",
        "u0 if u0 else u0",
        "u0 ** u1",
        "2 ** u0",
        "u0 ** 1000",
        "u1",
        "u9 + u0",
        "3.0",
        "u0 - u0",
        "1e999*u0",
        "u0/0",
        "u0 + True",
        "u0 + 1j",
        "relu(u0, 1)",
        "elu(u0)",
        "clamp(u0, u1, 2)",
        "u0 +",
        "",
        "maximum(u0, 2)",
        "u0 + relu(u0 - u0)",
        "u0 < 1",
    ],
)
def test_texts_outside_the_grammar_are_errors(text):
    with pytest.raises(ExpressionError):
        parse(text)


@pytest.mark.parametrize(
    "name, args, kwargs, text",
    [
        ("aten.gelu.default", [u0], {"approximate": "tanh"}, "gelu_tanh(u0)"),
        ("aten.relu_.default", [u0], {}, "relu(u0)"),
        ("aten.add.Tensor", [u0, u1], {"alpha": 2}, "u0 + 2*u1"),
        ("aten.add.Scalar", [u0, 1.5], {}, "u0 + 1.5"),
        ("aten.sub.Tensor", [u0, u1], {}, "u0 - u1"),
        ("aten.rsub.Scalar", [u0, 1, 2], {}, "1 - 2*u0"),
        ("aten.div.Tensor", [u0, u1], {}, "u0*u1**-1"),
        ("aten.div.Scalar", [u0, 4], {}, "0.25*u0"),
        ("aten.pow.Tensor_Scalar", [u0, 3.0], {}, "u0**3"),
        ("aten.square.default", [u0], {}, "u0**2"),
        ("aten.relu6.default", [u0], {}, "hardtanh(u0, 0, 6)"),
        ("aten.celu.default", [u0, 2.0], {}, "elu(u0, 2, 1, 0.5)"),
        ("aten.clamp.default", [u0], {"max": 1}, "clamp_max(u0, 1)"),
        ("aten.clamp.default", [u0, None, 1], {}, "clamp_max(u0, 1)"),
        ("aten.clamp.default", [u0, -1, 1], {}, "clamp(u0, -1, 1)"),
        ("aten.minimum.default", [u0, u1], {}, "-maximum(-u0, -u1)"),
    ],
)
def test_lift(name, args, kwargs, text):
    assert canonical(lift(name, args, kwargs)) == parse(text).text


@pytest.mark.parametrize(
    "name, args, kwargs",
    [
        ("aten.relu.out", [u0], {}),
        ("aten.sort.default", [u0], {}),
        ("prims.add.default", [u0, u1], {}),
        ("aten.pow.Tensor_Tensor", [u0, u1], {}),
        ("aten.div.Tensor_mode", [u0, 2], {"rounding_mode": "floor"}),
        ("aten.mul.Scalar", [u0, float("inf")], {}),
        ("aten.div.Scalar", [u0, 0], {}),
        ("aten.gelu.default", [u0, u1], {}),
        ("aten.clamp.Tensor", [u0, u1], {}),
        ("aten.clamp.default", [u0], {}),
        ("aten.mul.Tensor", [u0, object()], {}),
        ("aten.pow.Scalar", [2, u0], {}),
        ("aten.detach.default", [u0], {}),
    ],
)
def test_what_is_not_lifted(name, args, kwargs):
    assert lift(name, args, kwargs) is None


@pytest.mark.parametrize(
    "text, expected", [("u0**2", "2*u0"), ("u0*tanh(u0)", "u0*(1 - tanh(u0)**2) + tanh(u0)"), ("exp(3*u0)", "3*exp(3*u0)")]
)
def test_derivative(text, expected):
    assert canonical(derivative(parse(text).expression, u0)) == parse(expected).text


def test_derivative_of_a_power_does_not_divide_by_its_base():
    # sympy's own rule gives (u0*u1)**2.5 / (u0*u1), which is 0/0 at 0.
    slope = derivative(parse("(u0*u1)**2.5").expression, u1)
    assert slope.subs({u0: 1, u1: 0}) == 0
