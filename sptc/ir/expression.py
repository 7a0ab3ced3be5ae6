"""Smooth functions of one number as expressions: what a model computes of each logit or attention score alone, such as a soft cap.

A function is a sympy expression over `u0`. Each ATen op that is not plain arithmetic is a `sympy.Function` here, whose `fdiff` is its
derivative, again an expression. Arithmetic is sympy's; nothing is simplified beyond what sympy does on construction.

The text form travels in graphs as an op argument. Its grammar is a subset of Python expressions, parsed by `ast` and never evaluated:

    names        u0
    literals     integers and floats (17 significant digits)
    arithmetic   + - * /, and ** with a constant exponent
    calls        the names in FUNCTIONS, one positional argument
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch
from sympy.core.function import ArgumentIndexError
from sympy.printing.str import StrPrinter
from torch import Tensor

from sptc.ir.errors import SptcError

Number = int | float
MAX_EXPONENT = 64  # sympy multiplies integers out; no function of a logit is near this
U0 = sympy.Symbol("u0")


class ExpressionError(SptcError, ValueError):
    """A text is not a function of the grammar, or a number in it is not finite."""


class Smooth(sympy.Function):
    """f(x): the torch function of its name."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        if argindex != 1:
            raise ArgumentIndexError(self, argindex)
        return _SLOPES[type(self).__name__](self)


# The derivative of each function, of the function's own value f at f.args[0].
_SLOPES: Mapping[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "sigmoid": lambda f: f * (1 - f),
    "tanh": lambda f: 1 - f**2,
    "exp": lambda f: f,
    "erf": lambda f: number(2 / math.sqrt(math.pi)) * FUNCTIONS["exp"](-(f.args[0] ** 2)),
    "sqrt": lambda f: number(0.5) / f,
    "rsqrt": lambda f: number(-0.5) * f**3,
}
FUNCTIONS: Mapping[str, type[Smooth]] = {name: type(name, (Smooth,), {}) for name in _SLOPES}


def number(value: Number) -> sympy.Expr:
    """A number as sympy holds it here: an Integer if it is whole, else a Float of 17 digits.

    Raises:
        ExpressionError: `value` is infinite or not a number.
    """
    if not math.isfinite(value):
        raise ExpressionError(f"an expression can hold finite numbers only, got {value}")
    if float(value).is_integer() and abs(value) <= 2**53:
        return sympy.Integer(int(value))
    return sympy.Float(float(value), 17)


def normal(expr: sympy.Expr) -> sympy.Expr:
    """`expr` with every number as `number` holds it, so that equal functions have equal texts.

    Raises:
        ExpressionError: it holds something outside the grammar, such as an infinity.
    """
    seen = set()
    while expr not in seen:  # sympy multiplies a number into a sum of two factors, not of three: what is read from the text is taken
        seen.add(expr)
        while (rebuilt := _rebuild(expr)) != expr:
            expr = rebuilt
        text = _Text().doprint(expr)
        expr = _read(ast.parse(text, mode="eval").body, text)
    return expr


def canonical(expr: sympy.Expr) -> str:
    """The text of `expr`: `canonical(parse(canonical(e))) == canonical(e)`.

    Raises:
        ExpressionError: it holds something outside the grammar.
    """
    return _Text().doprint(normal(expr))


@lru_cache(maxsize=1024)
def parse(text: str) -> sympy.Expr:
    """Read a function of u0.

    Raises:
        ExpressionError: `text` is outside the grammar, or does not read u0.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ExpressionError(f"{text!r} is no expression: {error}") from error
    expr = normal(_read(tree.body, text))
    if not expr.has(U0):
        raise ExpressionError(f"{text!r} does not read u0")
    return expr


def derivative(expr: sympy.Expr) -> sympy.Expr:
    """d expr / d u0 by the chain rule over `fdiff`. sympy's own `diff` divides by the base of a power, which fails at 0."""
    if expr == U0:
        return sympy.Integer(1)
    return sum((_partial(expr, i) * derivative(arg) for i, arg in enumerate(expr.args) if arg.has(U0)), sympy.Integer(0))


def _partial(expr: sympy.Expr, i: int) -> sympy.Expr:
    """The derivative of `expr` in its i-th argument (from 0), as an expression of its arguments."""
    if expr.is_Add:
        return sympy.Integer(1)
    if expr.is_Mul:
        return sympy.Mul(*(arg for j, arg in enumerate(expr.args) if j != i))
    if expr.is_Pow:
        base, exponent = expr.args
        return exponent * base ** (exponent - 1)
    return expr.fdiff(i + 1)


def evaluate(expr: sympy.Expr, u: Tensor) -> Any:
    """An expression over u0 = `u`, differentiable; a number where it does not depend on it."""
    if expr == U0:
        return u
    if expr.is_Number:
        return float(expr)
    args = [evaluate(arg, u) for arg in expr.args]
    if expr.is_Pow:
        return args[0] ** args[1]
    if not (expr.is_Add or expr.is_Mul):
        return getattr(torch, type(expr).__name__)(*args)
    total = args[0]
    for arg in args[1:]:
        total = total + arg if expr.is_Add else total * arg
    return total


def statements(expr: sympy.Expr, constant: str, functions: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """`expr` in a language that writes sums and products as Python does.

    Args:
        constant: a number there, with `{}` for its digits.
        functions: what the functions of this module are called there.

    Returns:
        Locals t0, t1, ... and what each is, in order, one for each call of a function; and the result, as a text over u0 and these.

    Raises:
        ExpressionError: it calls a function without a name there, or has a power that is no positive integer.
    """
    calls: dict[str, str] = {}

    def written(e: sympy.Expr) -> str:
        if e == U0:
            return "u0"
        if e.is_Number:
            return constant.format(repr(float(e)))
        if e.is_Pow and e.exp.is_Integer and e.exp > 0:
            return "(" + " * ".join([written(e.base)] * int(e.exp)) + ")"
        if e.is_Add or e.is_Mul:
            return "(" + (" + " if e.is_Add else " * ").join(map(written, e.args)) + ")"
        name = functions.get(type(e).__name__)
        if name is None:
            raise ExpressionError(f"{canonical(e)} can't be written into a kernel")
        return calls.setdefault(f"{name}({written(e.args[0])})", f"t{len(calls)}")

    result = written(expr)
    return {local: call for call, local in calls.items()}, result


# Reading


_BINARY: dict[type[ast.operator], Callable[[sympy.Expr, sympy.Expr], sympy.Expr | None]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: _divide(a, b),
    ast.Pow: lambda a, b: _power(a, b),
}


def _read(node: ast.expr, text: str) -> sympy.Expr:
    match node:
        case ast.Name(id="u0"):
            return U0
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return number(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_read(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            result = _BINARY[type(op)](_read(left, text), _read(right, text))
            if result is not None:
                return result
        case ast.Call(func=ast.Name(id=name), args=[arg], keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](_read(arg, text))
    raise ExpressionError(f"{ast.unparse(node)!r} in {text!r} is not in the grammar of expressions")


def _divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    if b.is_Number:
        return None if b.is_zero else a * number(1 / float(b))
    return a * b**-1


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr | None:
    if base.is_Number or not exponent.is_Number or abs(exponent) > MAX_EXPONENT:
        return None
    return base**exponent


# Printing


def _rebuild(expr: sympy.Expr) -> sympy.Expr:
    if expr.is_Rational or expr.is_Float:
        return number(int(expr) if expr.is_Integer and abs(expr) <= 2**53 else float(expr))
    if expr == U0:
        return expr
    if not (expr.is_Add or expr.is_Mul or expr.is_Pow or isinstance(expr, Smooth)):
        raise ExpressionError(f"{expr} is not in the grammar of expressions")
    args = [_rebuild(arg) for arg in expr.args]
    if isinstance(expr, Smooth) and args[0].is_Number:
        raise ExpressionError(f"{expr} is a function of a number")
    return expr.func(*args)


class _Text(StrPrinter):
    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))


# Lifting: from ATen calls to expressions


def lift(op_name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> sympy.Expr | None:
    """What an ATen call computes, as an expression.

    Args:
        op_name: an overload as `str(node.target)` spells it: "aten.add.Tensor", "aten.tanh_.default" (in place counts like out of place).
        args: expressions, Python numbers, strings or None; anything else is not lifted.
        kwargs: likewise.

    Returns:
        The expression, or None if the op or this use of it is not one that an expression can hold.
    """
    builder = _builder(op_name)
    if builder is None or not all(arg is None or isinstance(arg, (sympy.Expr, int, float, str)) for arg in (*args, *kwargs.values())):
        return None
    try:
        inspect.signature(builder).bind(*args, **kwargs)
    except TypeError:
        return None
    try:
        value = builder(*map(_operand, args), **{name: _operand(arg) for name, arg in kwargs.items()})
        return None if value is None else normal(value)
    except ExpressionError:
        return None


def liftable(op_name: str) -> bool:
    """Whether `lift` knows the op (a use of it may still be refused)."""
    return _builder(op_name) is not None


def _builder(op_name: str) -> Callable[..., sympy.Expr | None] | None:
    namespace, _, rest = op_name.partition(".")
    base, _, overload = rest.partition(".")
    if namespace != "aten" or overload not in ("default", "Tensor", "Scalar", "Tensor_Scalar", "Tensor_mode"):
        return None
    return _BUILDERS.get(base.removesuffix("_"))


def _operand(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return number(value)


def _unary(function: type[Smooth]) -> Callable[..., sympy.Expr | None]:
    return lambda x: function(x)  # a signature of one argument, which a sympy class lacks


_ONE = number(1)  # ATen's default

_BUILDERS: dict[str, Callable[..., sympy.Expr | None]] = {
    "add": lambda x, y, alpha=_ONE: x + alpha * y,
    "sub": lambda x, y, alpha=_ONE: x - alpha * y,
    "rsub": lambda x, y, alpha=_ONE: y - alpha * x,
    "mul": lambda x, y: x * y,
    "multiply": lambda x, y: x * y,
    "div": lambda x, y, *, rounding_mode=None: _divide(x, y) if rounding_mode is None else None,
    "true_divide": lambda x, y: _divide(x, y),
    "neg": lambda x: -x,
    "reciprocal": lambda x: x**-1,
    "square": lambda x: x**2,
    "pow": lambda x, y: _power(x, y),
    **{name: _unary(function) for name, function in FUNCTIONS.items()},
}
