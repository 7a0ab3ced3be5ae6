"""Activations as expressions: what stands between the up projections and the down projection of an FFN.

An activation is a sympy expression over `u0 u1 ...`, the outputs of the up projections. Each elementwise ATen op that is not plain
arithmetic is a `sympy.Function` here, and its `fdiff` is torch's own derivative (relu'(0) = 0, clamp'(bound) = 1, hardtanh'(bound) = 0).
Arithmetic is sympy's; nothing is simplified beyond what sympy does on construction.

The text form travels in graphs as an op argument. Its grammar is a subset of Python expressions, parsed by `ast` and never evaluated:

    names        u0 u1 ...
    literals     integers and floats (17 significant digits)
    arithmetic   + - * /, and ** with a constant exponent
    calls        the names in FUNCTIONS, positional arguments only
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import sympy
from sympy.core.function import ArgumentIndexError

Number = int | float
MAX_UPS = 8
MAX_EXPONENT = 64  # sympy multiplies integers out; no activation is near this
SYMBOLS: tuple[sympy.Symbol, ...] = tuple(sympy.Symbol(f"u{i}") for i in range(MAX_UPS))


class ExpressionError(ValueError):
    """A text is not an activation of the grammar, or a number in it is not finite."""


class slope(sympy.Function):
    """slope(f(x, ...), i): the derivative of f in its i-th argument, where it is no arithmetic of known functions. Only in derivatives."""

    nargs = 2


class Elementwise(sympy.Function):
    """f(x, parameters...): the first `operands` arguments are expressions, the rest numbers."""

    operands = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """The derivative in one operand. A `slope` unless the class says otherwise."""
        if not 1 <= argindex <= self.operands:
            raise ArgumentIndexError(self, argindex)
        return slope(self, sympy.Integer(argindex))


class relu(Elementwise):
    """max(x, 0); slope 0 at 0."""

    nargs = 1


class gelu(Elementwise):
    """x Phi(x), with erf."""

    nargs = 1


class gelu_tanh(Elementwise):
    """gelu's tanh approximation."""

    nargs = 1


class silu(Elementwise):
    """x sigmoid(x)."""

    nargs = 1


class mish(Elementwise):
    """x tanh(softplus(x))."""

    nargs = 1


class softplus(Elementwise):
    """softplus(x, beta, threshold): log(1 + exp(beta x)) / beta, and x where beta x > threshold."""

    nargs = 3


class elu(Elementwise):
    """elu(x, alpha, scale, input_scale): scale x if x > 0, else scale alpha (exp(input_scale x) - 1)."""

    nargs = 4


class leaky_relu(Elementwise):
    """leaky_relu(x, negative_slope): x if x > 0, else negative_slope x."""

    nargs = 2


class hardtanh(Elementwise):
    """hardtanh(x, low, high): as clamp, but with slope 0 at the bounds."""

    nargs = 3


class hardswish(Elementwise):
    """x clamp(x + 3, 0, 6) / 6."""

    nargs = 1


class hardsigmoid(Elementwise):
    """clamp(x + 3, 0, 6) / 6, with slope 0 at the bounds."""

    nargs = 1


class clamp(Elementwise):
    """clamp(x, low, high), with slope 1 at the bounds."""

    nargs = 3


class clamp_min(Elementwise):
    """max(x, low), with slope 1 at the bound."""

    nargs = 2


class clamp_max(Elementwise):
    """min(x, high), with slope 1 at the bound."""

    nargs = 2


class absolute(Elementwise):
    """|x|, with slope 0 at 0."""

    nargs = 1


class maximum(Elementwise):
    """max(x, y), with slope 1/2 for both where they are equal."""

    nargs = 2
    operands = 2


class sigmoid(Elementwise):
    """1 / (1 + exp(-x))."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)


class tanh(Elementwise):
    """Hyperbolic tangent."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return 1 - self**2


class exp(Elementwise):
    """Exponential."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self


class erf(Elementwise):
    """Error function."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return number(2 / math.sqrt(math.pi)) * exp(-(self.args[0] ** 2))


class sqrt(Elementwise):
    """Square root."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return number(0.5) / self


class rsqrt(Elementwise):
    """1 / sqrt(x)."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return number(-0.5) * self**3


FUNCTIONS: Mapping[str, type[Elementwise]] = {cls.__name__: cls for cls in Elementwise.__subclasses__()}


@dataclass(frozen=True)
class Activation:
    """A canonical text, how many up projections it reads (u0 to u{arity - 1}, each of them), and its expression."""

    text: str
    arity: int
    expression: sympy.Expr = field(repr=False, compare=False)


def number(value: Number) -> sympy.Expr:
    """A number as sympy holds it here: an Integer if it is whole, else a Float of 17 digits.

    Raises:
        ExpressionError: `value` is infinite or not a number.
    """
    if not math.isfinite(value):
        raise ExpressionError(f"an activation can hold finite numbers only, got {value}")
    if float(value).is_integer() and abs(value) <= 2**53:
        return sympy.Integer(int(value))
    return sympy.Float(float(value), 17)


def normal(expr: sympy.Expr) -> sympy.Expr:
    """`expr` with every number as `number` holds it, so that equal activations have equal texts.

    Raises:
        ExpressionError: it holds something outside the grammar, such as an infinity.
    """
    while (rebuilt := _rebuild(expr)) != expr:
        expr = rebuilt
    return expr


def canonical(expr: sympy.Expr) -> str:
    """The text of `expr`: `parse(canonical(e)).text == canonical(e)`.

    Raises:
        ExpressionError: it holds something outside the grammar.
    """
    return _print(normal(expr))


@lru_cache(maxsize=1024)
def parse(text: str) -> Activation:
    """Read an activation.

    Raises:
        ExpressionError: `text` is outside the grammar, reads no `u`, or leaves out one below the highest.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ExpressionError(f"{text!r} is no expression: {error}") from error
    expr = normal(_read(tree.body, text))
    used = {symbol.name for symbol in expr.free_symbols}
    arity = len(used)
    if not used or used != {symbol.name for symbol in SYMBOLS[:arity]}:
        raise ExpressionError(f"{text!r} must read u0, u1, ... without a gap, but reads {sorted(used) or 'none of them'}")
    return Activation(_print(expr), arity, expr)


def derivative(expr: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """d expr / d symbol by the chain rule over `fdiff`. sympy's own `diff` divides by the base of a power, which fails at 0."""
    if expr == symbol:
        return sympy.Integer(1)
    return sum((partial(expr, i) * derivative(arg, symbol) for i, arg in enumerate(expr.args) if arg.has(symbol)), sympy.Integer(0))


def partial(expr: sympy.Expr, i: int) -> sympy.Expr:
    """The derivative of `expr` in its i-th argument (from 0), as an expression of its arguments."""
    if expr.is_Add:
        return sympy.Integer(1)
    if expr.is_Mul:
        return sympy.Mul(*(arg for j, arg in enumerate(expr.args) if j != i))
    if expr.is_Pow:
        base, exponent = expr.args
        return exponent * base ** (exponent - 1)
    return expr.fdiff(i + 1)


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
        case ast.Name(id=name):
            for symbol in SYMBOLS:
                if symbol.name == name:
                    return symbol
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return number(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_read(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            result = _BINARY[type(op)](_read(left, text), _read(right, text))
            if result is not None:
                return result
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            function = FUNCTIONS[name]
            values = [_read(arg, text) for arg in args]
            if len(values) in function.nargs and all(value.is_Number for value in values[function.operands :]):
                return function(*values)
    raise ExpressionError(f"{ast.unparse(node)!r} in {text!r} is not in the grammar of activations")


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
    if expr.is_Symbol:
        return expr
    if not (expr.is_Add or expr.is_Mul or expr.is_Pow or isinstance(expr, Elementwise)):
        raise ExpressionError(f"{expr} is not in the grammar of activations")
    args = [_rebuild(arg) for arg in expr.args]
    if isinstance(expr, Elementwise) and any(arg.is_Number for arg in args[: expr.operands]):
        raise ExpressionError(f"{expr} is a function of a number")
    return expr.func(*args)


_SUM, _PRODUCT, _POWER, _ATOM = range(4)  # how tightly a text binds


def _print(expr: sympy.Expr, level: int = _SUM) -> str:
    text, own = _text(expr)
    return f"({text})" if own < level else text


def _text(expr: sympy.Expr) -> tuple[str, int]:
    if expr.is_Number:
        return (str(int(expr)) if expr.is_Integer else repr(float(expr))), (_SUM if expr < 0 else _ATOM)
    if expr.is_Symbol:
        return expr.name, _ATOM
    if expr.is_Add:
        return " + ".join(map(_print, expr.args)).replace("+ -", "- "), _SUM
    if expr.is_Mul:
        text = "*".join(_print(arg, _SUM if i == 0 and arg.is_Number else _PRODUCT) for i, arg in enumerate(expr.args))
        return text, (_SUM if text.startswith("-") else _PRODUCT)
    if expr.is_Pow:
        return f"{_print(expr.base, _ATOM)}**{_print(expr.exp, _ATOM)}", _POWER
    return f"{expr.func.__name__}({', '.join(map(_print, expr.args))})", _ATOM


# Lifting: from ATen calls to expressions


def lift(op_name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> sympy.Expr | None:
    """What an ATen call computes, as an expression.

    Args:
        op_name: an overload as `str(node.target)` spells it: "aten.add.Tensor", "aten.relu_.default" (in place counts like out of place).
        args: expressions, Python numbers, strings or None; anything else is not lifted.
        kwargs: likewise; `memory_format` does not matter.

    Returns:
        The expression, or None if the op or this use of it is not one an activation can hold.
    """
    builder = _builder(op_name)
    if builder is None:
        return None
    kwargs = {name: arg for name, arg in kwargs.items() if name != "memory_format"}
    if not all(arg is None or isinstance(arg, (sympy.Expr, int, float, str)) for arg in (*args, *kwargs.values())):
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


def _unary(function: type[Elementwise]) -> Callable[..., sympy.Expr | None]:
    return lambda x: function(x)


def _gelu(x: sympy.Expr, *, approximate: str = "none") -> sympy.Expr | None:
    return {"none": gelu, "tanh": gelu_tanh}[approximate](x)


def _clamp(x: sympy.Expr, min: sympy.Expr | None = None, max: sympy.Expr | None = None) -> sympy.Expr | None:  # ATen's argument names
    if any(bound is not None and not bound.is_Number for bound in (min, max)):
        return None
    if min is not None and max is not None:
        return clamp(x, min, max)
    if min is None and max is None:
        return None
    return clamp_max(x, max) if min is None else clamp_min(x, min)


_ONE, _SLOPE, _THRESHOLD = number(1), number(0.01), number(20)  # ATen's defaults

_BUILDERS: dict[str, Callable[..., sympy.Expr | None]] = {
    "add": lambda x, y, alpha=_ONE: x + alpha * y,
    "sub": lambda x, y, alpha=_ONE: x - alpha * y,
    "rsub": lambda x, y, alpha=_ONE: y - alpha * x,
    "mul": lambda x, y: x * y,
    "div": lambda x, y, *, rounding_mode=None: _divide(x, y) if rounding_mode is None else None,
    "neg": lambda x: -x,
    "reciprocal": lambda x: x**-1,
    "square": lambda x: x**2,
    "pow": lambda x, y: _power(x, y),
    "clone": lambda x: x,
    "contiguous": lambda x: x,
    "alias": lambda x: x,
    "relu6": lambda x: hardtanh(x, 0, 6),
    "hardtanh": lambda x, low=-_ONE, high=_ONE: hardtanh(x, low, high),
    "leaky_relu": lambda x, negative_slope=_SLOPE: leaky_relu(x, negative_slope),
    "elu": lambda x, alpha=_ONE, scale=_ONE, input_scale=_ONE: elu(x, alpha, scale, input_scale),
    "selu": lambda x: elu(x, number(1.6732632423543772848170429916717), number(1.0507009873554804934193349852946), 1),
    "celu": lambda x, alpha=_ONE: None if alpha.is_zero else elu(x, alpha, 1, number(1 / float(alpha))),
    "softplus": lambda x, beta=_ONE, threshold=_THRESHOLD: softplus(x, beta, threshold),
    "gelu": _gelu,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda x, min: _clamp(x, min, None),
    "clamp_max": lambda x, max: _clamp(x, None, max),
    "maximum": lambda x, y: maximum(x, y),
    "minimum": lambda x, y: -maximum(-x, -y),
    "abs": _unary(absolute),
    "multiply": lambda x, y: x * y,
    "true_divide": lambda x, y: _divide(x, y),
    **{f.__name__: _unary(f) for f in (relu, silu, mish, hardswish, hardsigmoid, sigmoid, tanh, exp, erf, sqrt, rsqrt)},
}
