"""An activation as a program of calls, forward and backward: on a CPU each is one vectorised pass over memory, in a kernel one expression.

The calls have names ("silu", "silu_backward"); here they are ATen's, in `codegen/templates/elementary.py` they are Triton's.

Backward is reverse mode over the expression with each op's `fdiff`. Where ATen has a kernel for "gradient times slope" it is used: it
costs one pass, and where the slope is 0 it gives 0 even for an infinite gradient, as torch's own autograd does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy
import torch
from torch import Tensor

from sptc import expression as ex
from sptc.codegen.recognize import recognize

aten = torch.ops.aten
Operand = str | float  # the name of a value, or a number


@dataclass(frozen=True)
class Primitive:
    """A torch call. `buffer` is the keyword under which it takes memory to write to; None: it always makes its own."""

    call: Callable[..., Tensor]
    buffer: str | None = "out"


@dataclass(frozen=True)
class Step:
    """result = op(*args, **kwargs), written over the value `into` (dead by then, of the same shape) if there is one."""

    result: str
    op: str
    args: tuple[Operand, ...]
    kwargs: tuple[tuple[str, object], ...] = ()
    into: str | None = None

    def __str__(self) -> str:
        arguments = [*map(str, self.args), *(f"{k}={v!r}" for k, v in self.kwargs), *([f"out={self.into}"] if self.into else [])]
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

    def run(self, *tensors: Tensor) -> list[Tensor | float]:
        """Outputs; a number where an output does not depend on the inputs."""
        values: dict[str, Tensor] = dict(zip(self.inputs, tensors, strict=True))
        for step in self.steps:
            primitive = _PRIMITIVES[step.op]
            args = [values[arg] if isinstance(arg, str) else arg for arg in step.args]
            kwargs = dict(step.kwargs)
            if step.into is not None and primitive.buffer is not None:
                kwargs[primitive.buffer] = values[step.into]
            values[step.result] = primitive.call(*args, **kwargs)
        return [values[output] if isinstance(output, str) else output for output in self.outputs]


@dataclass(frozen=True)
class CompiledActivation:
    """What `compile_activation` returns."""

    arity: int
    forward_program: Program
    backward_program: Program

    def forward(self, us: Sequence[Tensor]) -> Tensor:
        """act(u0, ...), a fresh tensor in the dtype of `us`, which are of one shape and fp32 (or fp64), and unchanged."""
        [value] = self.forward_program.run(*us)
        if not isinstance(value, Tensor):  # an activation reads its inputs, so it is no number
            raise AssertionError(f"{self.forward_program} computes no tensor")
        # A program without steps returns its input, and outputs are never aliases.
        return value.clone() if any(value is u for u in us) else value

    def backward(self, us: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """d loss / d u_i for each i, given grad = d loss / d act. `grad` is scratch: it may be overwritten, and be among the results."""
        values = self.backward_program.run(grad, *us)
        return [value if isinstance(value, Tensor) else torch.full_like(grad, value) for value in values]


@lru_cache(maxsize=256)
def compile_activation(text: str) -> CompiledActivation:
    """Programs for a canonical text.

    Raises:
        ExpressionError: `text` is no activation.
    """
    forward, backward = program(text, value=True), program(text, gradients=True)
    return CompiledActivation(len(forward.inputs), _reuse(forward), _reuse(backward, scratch=("grad",)))


def program(text: str, value: bool = False, gradients: bool = False) -> Program:
    """The steps from u0, ... to act, and from grad, u0, ... to its gradients; each value once, none written over.

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
        if name in _PRIMITIVES:
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


def _reuse(program: Program, scratch: tuple[str, ...] = ()) -> Program:
    """Let each step write over an argument that nothing reads later: a value of an earlier step, or a `scratch` input."""
    last = {arg: i for i, step in enumerate(program.steps) for arg in step.args}
    free = {*scratch, *(step.result for step in program.steps)} - set(program.outputs)

    def with_memory(i: int, step: Step) -> Step:
        if _PRIMITIVES[step.op].buffer is None:
            return step
        return replace(step, into=next((arg for arg in step.args if arg in free and last[arg] == i), None))

    return replace(program, steps=tuple(with_memory(i, step) for i, step in enumerate(program.steps)))


# Primitives that ATen does not have as one op


def _clamp_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return torch.where((x >= low) & (x <= high), grad, 0.0)


def _clamp_min_backward(grad: Tensor, x: Tensor, low: float) -> Tensor:
    return torch.where(x >= low, grad, 0.0)


def _clamp_max_backward(grad: Tensor, x: Tensor, high: float) -> Tensor:
    return torch.where(x <= high, grad, 0.0)


def _maximum_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x == y, grad / 2, grad).masked_fill_(x < y, 0.0)


_PRIMITIVES: dict[str, Primitive] = {
    **{
        name: Primitive(getattr(aten, name))
        for name in ("add", "mul", "pow", "reciprocal", "sigmoid", "tanh", "exp", "erf", "sqrt", "rsqrt")
    },
    **{name: Primitive(getattr(aten, name)) for name in ("relu", "gelu", "silu", "mish", "softplus", "elu", "leaky_relu", "hardtanh")},
    **{name: Primitive(getattr(aten, name)) for name in ("hardswish", "hardsigmoid", "clamp", "clamp_min", "clamp_max", "maximum")},
    "absolute": Primitive(aten.abs),
    "gelu_tanh": Primitive(lambda x, **out: aten.gelu(x, approximate="tanh", **out)),
    "sigmoid_backward": Primitive(aten.sigmoid_backward, "grad_input"),
    "tanh_backward": Primitive(aten.tanh_backward, "grad_input"),
    "relu_backward": Primitive(lambda grad, x, **out: aten.threshold_backward(grad, x, 0, **out), "grad_input"),
    "gelu_backward": Primitive(aten.gelu_backward, "grad_input"),
    "gelu_tanh_backward": Primitive(lambda grad, x, **out: aten.gelu_backward(grad, x, approximate="tanh", **out), "grad_input"),
    "silu_backward": Primitive(aten.silu_backward, "grad_input"),
    "mish_backward": Primitive(aten.mish_backward, None),
    "softplus_backward": Primitive(aten.softplus_backward, "grad_input"),
    "elu_backward": Primitive(lambda grad, x, a, s, i, **out: aten.elu_backward(grad, a, s, i, False, x, **out), "grad_input"),
    "leaky_relu_backward": Primitive(lambda grad, x, s, **out: aten.leaky_relu_backward(grad, x, s, False, **out), "grad_input"),
    "hardtanh_backward": Primitive(aten.hardtanh_backward, "grad_input"),
    "hardswish_backward": Primitive(aten.hardswish_backward),
    "hardsigmoid_backward": Primitive(aten.hardsigmoid_backward, "grad_input"),
    "clamp_backward": Primitive(_clamp_backward, None),
    "clamp_min_backward": Primitive(_clamp_min_backward, None),
    "clamp_max_backward": Primitive(_clamp_max_backward, None),
    "absolute_backward": Primitive(lambda grad, x: grad * x.sgn(), None),
    "maximum_backward": Primitive(_maximum_backward, None),
}
