"""An activation as a program of calls, forward and backward, from which C++ and Triton are written.

The calls have names ("silu", "silu_backward"): functions of `codegen/cpu/native/elementary.h` and of `codegen/templates/elementary.py`.

Backward is reverse mode over the expression with each op's `fdiff`. Most ops have a function for "gradient times slope": where the slope
is 0 it gives 0 even for an infinite gradient, as torch's own autograd does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from sptc import expression as ex
from sptc.codegen.recognize import recognize

Operand = str | float  # the name of a value, or a number

BACKWARD = frozenset(
    f"{name}_backward"
    for name in (
        *("relu", "gelu", "gelu_tanh", "silu", "mish", "sigmoid", "tanh", "softplus", "elu", "leaky_relu", "hardtanh", "hardswish"),
        *("hardsigmoid", "clamp", "clamp_min", "clamp_max", "absolute", "maximum"),
    )
)
"""Functions "gradient times slope"."""


@dataclass(frozen=True)
class Step:
    """result = op(*args, **kwargs)."""

    result: str
    op: str
    args: tuple[Operand, ...]
    kwargs: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        arguments = [*map(str, self.args), *(f"{k}={v!r}" for k, v in self.kwargs)]
        return f"{self.result} = {self.op}({', '.join(arguments)})"


@dataclass(frozen=True)
class Program:
    """Steps from named inputs to named outputs. `str(program)` shows them."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Operand, ...]

    def __str__(self) -> str:
        return "\n".join(
            [f"({', '.join(self.inputs)})", *(f"    {step}" for step in self.steps), f"    -> {', '.join(map(str, self.outputs))}"]
        )


def program(text: str, value: bool = False, gradients: bool = False) -> Program:
    """The steps from u0, ... to act, and from grad, u0, ... to its gradients; each value once.

    Raises:
        ExpressionError: `text` is no activation.
    """
    activation = ex.parse(text)
    expr, symbols = recognize(activation.expression), ex.SYMBOLS[: activation.arity]
    builder = _Builder()
    outputs = [builder.emit(expr)] if value else []
    outputs += builder.gradients(expr, symbols) if gradients else []
    names = tuple(symbol.name for symbol in symbols)
    return Program(("grad", *names) if gradients else names, tuple(builder.steps), tuple(outputs))


# Emitting


class _Builder:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._known: dict[tuple[str, tuple[Operand, ...], tuple[tuple[str, object], ...]], str] = {}

    def call(self, op: str, *args: Operand, **kwargs: object) -> str:
        """The value of op(*args), computed once."""
        key = (op, args, tuple(kwargs.items()))
        if key not in self._known:
            self._known[key] = f"v{len(self.steps)}"
            self.steps.append(Step(self._known[key], *key))
        return self._known[key]

    def emit(self, expr: sympy.Expr) -> Operand:
        """The value of `expr`."""
        if expr.is_Number:
            return float(expr)
        if expr.is_Symbol:
            return expr.name
        if expr.is_Add:
            return self._sum(expr)
        if expr.is_Mul:
            return self._product([self.emit(arg) for arg in expr.args])
        if expr.is_Pow:
            return self._power(self.emit(expr.base), float(expr.exp))
        name = type(expr).__name__
        return self.call(name, *map(self.emit, expr.args))

    def gradients(self, expr: sympy.Expr, symbols: Sequence[sympy.Symbol]) -> list[Operand]:
        """grad * d expr / d symbol for each symbol, by reverse mode: parents before children, each once."""
        adjoints: dict[sympy.Expr, Operand] = {expr: "grad"}
        for node in reversed(list(dict.fromkeys(sympy.postorder_traversal(expr)))):
            if node.is_Symbol or node.is_Number:
                continue
            for i, arg in enumerate(node.args):
                if arg.is_Number:
                    continue
                term = self._adjoint(node, i, adjoints[node])
                adjoints[arg] = self.call("add", adjoints[arg], term) if arg in adjoints else term
        return [adjoints.get(symbol, 0.0) for symbol in symbols]

    def _adjoint(self, node: sympy.Expr, i: int, adjoint: Operand) -> Operand:
        """`adjoint` times the partial derivative of `node` in argument i."""
        name = f"{type(node).__name__}_backward"
        if name in BACKWARD:
            if isinstance(node, (ex.tanh, ex.sigmoid)):
                return self.call(name, adjoint, self.emit(node))
            operands = [self.emit(arg) for arg in node.args]
            if i == 1:  # the second operand of a symmetric function
                operands.reverse()
            return self.call(name, adjoint, *operands)
        return self._product([adjoint, self.emit(ex.partial(node, i))])

    def _sum(self, expr: sympy.Expr) -> Operand:
        constant, terms = expr.as_coeff_Add()
        pairs = sorted((arg.as_coeff_Mul() for arg in sympy.Add.make_args(terms)), key=lambda pair: pair[0] != 1)
        total = self._product([self.emit(pairs[0][0]), self.emit(pairs[0][1])])
        for coefficient, rest in pairs[1:]:
            scaled = {} if coefficient == 1 else {"alpha": float(coefficient)}
            total = self.call("add", total, self.emit(rest), **scaled)
        return total if constant == 0 else self.call("add", total, float(constant))

    def _product(self, operands: Sequence[Operand]) -> Operand:
        coefficient, names = 1.0, []
        for operand in operands:
            if isinstance(operand, str):
                names.append(operand)
            else:
                coefficient *= operand
        if not names:
            return coefficient
        total = names[0]
        for name in names[1:]:
            total = self.call("mul", total, name)
        return total if coefficient == 1.0 else self.call("mul", total, coefficient)

    def _power(self, base: Operand, exponent: float) -> Operand:
        if exponent in (2.0, 3.0):
            square = self.call("mul", base, base)
            return square if exponent == 2.0 else self.call("mul", square, base)
        return self.call("reciprocal", base) if exponent == -1.0 else self.call("pow", base, exponent)
