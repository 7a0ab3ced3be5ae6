"""A function of single scores as C++ over a whole buffer of them: the `Transform` of native/attention.cpp."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sptc.codegen.cpu.compiler import REAL, library
from sptc.ir.expression import canonical, derivative, parse, statements

_FUNCTIONS = {"tanh": "hyperbolic_tangent", "sigmoid": "logistic", "exp": "exponential", "erf": "error_function"}
_SOURCE = """#include "functions.h"

// {text}
extern "C" void transform(i64 count, REAL* scores, REAL* slopes) {{
    if (slopes)
        for (i64 i = 0; i < count; i += LANES) {{
            const Vector u0 = load(scores + i);
            {slope}
        }}
    for (i64 i = 0; i < count; i += LANES) {{
        const Vector u0 = load(scores + i);
        {value}
    }}
}}
"""


@functools.lru_cache(maxsize=64)
def transform(text: str, dtype: torch.dtype) -> Any:
    """The compiled function of `text`, a smooth function of u0: scores become its values, and slopes, where given, its derivatives.

    Args:
        dtype: of the arithmetic: float32 or float64.

    Raises:
        ExpressionError: `text` is no such function, or has one that is not written here.
    """
    function = parse(text)
    source = _SOURCE.format(
        text=canonical(function), value=_stored(function, "scores", " " * 8), slope=_stored(derivative(function), "slopes", " " * 12)
    )
    return library(source, REAL[dtype]).transform


def _stored(function: Any, where: str, indent: str) -> str:
    calls, result = statements(function, "REAL({})", _FUNCTIONS)
    lines = [*(f"const Vector {name} = {call};" for name, call in calls.items()), f"store({where} + i, Vector{{}} + {result});"]
    return f"\n{indent}".join(lines)
