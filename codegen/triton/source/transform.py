"""A function of single scores as Triton functions: its value and its derivative."""

from __future__ import annotations

from sptc.ir.expression import canonical, derivative, parse, statements

TRANSFORM_HOOKS = ("transformed", "transform_slope")
HELPERS = "functions"

_FUNCTIONS = {"tanh": "hyperbolic_tangent", "sigmoid": "logistic", "exp": "tl.exp", "erf": "tl.erf"}


def transform_source(text: str, name: str) -> str:
    """The function that a hook stands for.

    Args:
        text: a smooth function of u0.
        name: of TRANSFORM_HOOKS.

    Raises:
        ExpressionError: `text` is no such function, or has one that is not written here.
    """
    function = parse(text)
    of_slope = name == "transform_slope"
    calls, result = statements(derivative(function) if of_slope else function, "{}", _FUNCTIONS)
    meaning = f"{'The slope of ' if of_slope else ''}{canonical(function)}"
    lines = [f'"""{meaning}"""', *(f"{local} = {call}" for local, call in calls.items()), f"return {result}"]
    return f"@triton.jit\ndef {name}(u0):\n" + "".join(f"    {line}\n" for line in lines)
