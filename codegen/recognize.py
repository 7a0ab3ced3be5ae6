"""Spelled-out activations as the one op they equal: algebra on expressions, so that a chain of eight passes over memory becomes one."""

from __future__ import annotations

import math

import sympy

from sptc.expression import erf, gelu, gelu_tanh, mish, number, sigmoid, silu, softplus, tanh

_COEFFICIENT_TOLERANCE = 1e-7  # models round sqrt(2 / pi) differently; half a unit of fp32


def recognize(expr: sympy.Expr) -> sympy.Expr:
    """`expr` with these products replaced, for any factor w:

    w sigmoid(c w) = silu(c w) / c;  w tanh(softplus(w)) = mish(w);  w (1 + erf(w / sqrt 2)) = 2 gelu(w);
    w (1 + tanh(sqrt(2 / pi) (w + 0.044715 w^3))) = 2 gelu_tanh(w).

    Equal for finite w; for infinite w the value is that of the op (aten.gelu(inf) is nan on a CPU, where the formula with erf gives inf).
    """
    if not expr.args:
        return expr
    expr = expr.func(*map(recognize, expr.args))
    while expr.is_Mul and (found := _product(expr.args)) is not None:
        expr = found
    return expr


def _product(factors: tuple[sympy.Expr, ...]) -> sympy.Expr | None:
    for i, gate in enumerate(factors):
        for j, w in enumerate(factors):
            if i != j and not w.is_Number and (whole := _gated(w, gate)) is not None:
                return sympy.Mul(whole, *(f for k, f in enumerate(factors) if k not in (i, j)))
    return None


def _gated(w: sympy.Expr, gate: sympy.Expr) -> sympy.Expr | None:
    """w * gate as one op, or None."""
    if isinstance(gate, sigmoid):
        ratio = gate.args[0] / w
        return silu(gate.args[0]) * number(1 / float(ratio)) if ratio.is_Number else None
    if isinstance(gate, tanh):
        return mish(w) if gate.args[0] == softplus(w, 1, 20) else None
    if not (gate.is_Add and len(gate.args) == 2 and gate.args[0].is_Number):
        return None
    one, (coefficient, curve) = gate.args[0], gate.args[1].as_coeff_Mul()
    if not _close(one, coefficient):
        return None
    if isinstance(curve, erf) and _close(curve.args[0], w * number(math.sqrt(0.5))):
        return 2 * one * gelu(w)
    if isinstance(curve, tanh) and _close(curve.args[0], number(math.sqrt(2 / math.pi)) * (w + number(0.044715) * w**3)):
        return 2 * one * gelu_tanh(w)
    return None


def _close(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Equal up to the rounding of coefficients."""
    return all(abs(term.as_coeff_Mul()[0]) <= _COEFFICIENT_TOLERANCE for term in sympy.Add.make_args(a - b))
