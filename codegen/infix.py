"""Programs of activations (`codegen/expr.py`) as lines of a language with infix operators: sums and products infix, all else as calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from sptc.codegen.expr import Operand, Program, Step

_INLINE = 48  # longer expressions get a name
_SUM, _PRODUCT, _UNARY, _ATOM = range(4)  # how tightly a text binds


@dataclass(frozen=True)
class Dialect:
    """How a language writes what is not infix."""

    number: Callable[[float], str]
    assign: Callable[[str, str], str]  # of a name and an expression
    full: Callable[[str, str], str]  # of a symbol and a number: the number in the shape of the symbol


@dataclass(frozen=True)
class _Text:
    text: str
    level: int = _ATOM

    def at(self, level: int) -> str:
        return self.text if self.level >= level else f"({self.text})"


def printed(program: Program, dialect: Dialect) -> tuple[list[str], list[str]]:
    """Assignments, and what they say the outputs are."""
    printer = _Printer(program, dialect)
    outputs = printer.outputs()
    return printer.lines, outputs


class _Printer:
    def __init__(self, program: Program, dialect: Dialect) -> None:
        self.program, self.dialect = program, dialect
        self.lines: list[str] = []
        self._symbols = [name for name in program.inputs if name != "grad"]
        self._uses = Counter(arg for step in program.steps for arg in step.args if isinstance(arg, str))
        self._texts: dict[str, _Text] = {name: _Text(name) for name in program.inputs}
        self._known: dict[str, str] = {}  # expression -> the name that it has
        self._counts: Counter[str] = Counter()

    def outputs(self) -> list[str]:
        """Write the assignments to `lines`; what to return."""
        gradients = [f"grad_{symbol}" for symbol in self._symbols] if "grad" in self.program.inputs else []
        names = ["value"] * (len(self.program.outputs) - len(gradients)) + gradients
        wanted: dict[Operand, str] = {}
        for output, name in zip(self.program.outputs, names, strict=True):
            if output not in self.program.inputs:
                wanted.setdefault(output, name)
        for step in self.program.steps:
            text = self._text(step)
            if step.result in wanted or self._uses[step.result] > 1 or len(text.text) > _INLINE:
                text = self._named(text, wanted.get(step.result) or self._fresh(step.op))
            self._texts[step.result] = text
        return [self._output(output) for output in self.program.outputs]

    def _output(self, output: Operand) -> str:
        if isinstance(output, str):
            return self._texts[output].text
        return self.dialect.full(self._symbols[0], self.dialect.number(output))

    def _named(self, text: _Text, name: str) -> _Text:
        if text.text not in self._known:
            self._known[text.text] = name
            self.lines.append(self.dialect.assign(name, text.text))
        return _Text(self._known[text.text])

    def _fresh(self, op: str) -> str:
        stem = {"mul": "product", "add": "sum", "pow": "power"}.get(op, op)
        stem = f"grad_{stem.removesuffix('_backward')}" if stem.endswith("_backward") else stem
        self._counts[stem] += 1
        return f"{stem}_{self._counts[stem]}"

    def _operand(self, operand: Operand) -> _Text:
        if isinstance(operand, str):
            return self._texts[operand]
        return _Text(self.dialect.number(operand), _UNARY if operand < 0 else _ATOM)

    def _text(self, step: Step) -> _Text:
        left = self._operand(step.args[0])
        match step.op, step.args[1:]:
            case "add", [right]:
                return self._sum(left, right, dict(step.kwargs).get("alpha", 1.0))
            case "mul", [float() as constant]:
                return _Text(
                    f"-{left.at(_UNARY)}" if constant == -1.0 else f"{self.dialect.number(constant)} * {left.at(_UNARY)}", _PRODUCT
                )
            case "mul", [right]:
                return _Text(f"{left.at(_PRODUCT)} * {self._operand(right).at(_UNARY)}", _PRODUCT)
            case "reciprocal", []:
                return _Text(f"{self.dialect.number(1.0)} / {left.at(_UNARY)}", _PRODUCT)
            case "pow", [float() as exponent]:
                return self._power(left, exponent)
        return _Text(f"{step.op}({', '.join(self._operand(arg).text for arg in step.args)})")

    def _sum(self, left: _Text, right: Operand, alpha: object) -> _Text:
        assert isinstance(alpha, float)
        factor, other = (alpha * right, None) if isinstance(right, float) else (alpha, self._operand(right))
        if other is None:
            added = self.dialect.number(abs(factor))
        else:
            added = other.at(_PRODUCT) if abs(factor) == 1.0 else f"{self.dialect.number(abs(factor))} * {other.at(_UNARY)}"
        return _Text(f"{left.at(_SUM)} {'-' if factor < 0 else '+'} {added}", _SUM)

    def _power(self, base: _Text, exponent: float) -> _Text:
        """Products and a root where the exponent is a multiple of 1/2: they are right for negative bases and for 0."""
        whole, half = divmod(abs(exponent), 1.0)
        if half not in (0.0, 0.5):
            return _Text(f"power({base.text}, {self.dialect.number(exponent)})")
        if base.level != _ATOM:
            base = self._named(base, self._fresh("base"))
        factors = [f"sqrt({base.text})"] if half else []
        count, square = int(whole), base
        while count:
            if count & 1:
                factors.append(square.text)
            count >>= 1
            if count:
                square = self._named(_Text(f"{square.text} * {square.text}"), self._fresh("square"))
        product = _Text(" * ".join(factors), _PRODUCT if len(factors) > 1 else _ATOM)
        return product if exponent > 0 else _Text(f"{self.dialect.number(1.0)} / {product.at(_UNARY)}", _PRODUCT)
