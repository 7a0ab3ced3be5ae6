"""A mask predicate as Triton functions: element by element, and over whole ranges of queries and keys by interval arithmetic.

The second is what lets a kernel skip the test in blocks where the predicate holds throughout, and whole blocks where it holds nowhere:
it is `sptc/ir/intervals.py` for one pair of ranges and the conjuncts that read no tensor.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from sptc.ir.condition import OPERATORS, Binary, Element, Expression, Index, Literal, Not, PredicateError, Size, positive
from sptc.ir.intervals import Interval, Intervals
from sptc.ir.predicate import Predicate, parse

PREDICATE_HOOKS = ("allowed", "allowed_by_tensors", "allowed_by_positions", "holds_throughout", "holds_nowhere")
HELPERS = "integers"

_FUNCTIONS = {"//": "floor_divide", "%": "floor_modulo"}


def predicate_source(text: str, name: str) -> str:
    """The function that a hook stands for.

    Args:
        text: a predicate.
        name: of PREDICATE_HOOKS; `codegen/triton/templates/language.py` says what each takes and returns. Strides are those of the axes of
            t0, then t1, ..., without tensors that the predicate does not read.

    Raises:
        PredicateError: `text` is no predicate, or indexes one tensor with different numbers of indices.
    """
    predicate = parse(text)
    sizes = [f"s{i}" for i in range(predicate.size_count)]
    if name.startswith("allowed"):
        ranks = _ranks(predicate)
        strides = [f"t{i}_stride_{axis}" for i, rank in sorted(ranks.items()) for axis in range(rank)]
        parameters = ["b", "h", "q", "k", "live", *(f"t{i}" for i in range(predicate.tensor_count)), *strides, *sizes]
        chosen = [part for part in predicate.conjuncts if name == "allowed" or bool(part.tensor_count) == (name == "allowed_by_tensors")]
        writer = _Elements()
        conditions = [writer.condition(positive(part.tree)) for part in chosen]
        result = " & ".join(["live", *map(_grouped, conditions)])
        lines, meaning = writer.lines, _conjunction(chosen)
    else:
        parameters = ["b", "h", "q_first", "q_last", "k_first", "k_last", *sizes]
        chosen = [part for part in predicate.conjuncts if not part.tensor_count]
        bounds = _Bounds()
        truths = [bounds.truth(part.tree) for part in chosen]
        certain, nowhere = _all([truth.certain.code for truth in truths]), _any([truth.nowhere.code for truth in truths])
        result = f"tl.cast({certain if name == 'holds_throughout' else nowhere}, tl.int1)"
        sure = "holds for all" if name == "holds_throughout" else "fails for all"
        lines, meaning = bounds.lines, f"Whether it is certain that {_conjunction(chosen)} {sure} q and k of these ranges."
    statements = "".join(f"    {statement}\n" for statement in (f'"""{meaning}"""', *lines, f"return {result}"))
    return f"@triton.jit\ndef {name}({', '.join(parameters)}):\n{statements}"


def _conjunction(parts: Sequence[Predicate]) -> str:
    texts = [str(part) for part in parts]
    return texts[0] if len(texts) == 1 else " & ".join(f"({text})" for text in texts) or "True"


def _ranks(predicate: Predicate) -> dict[int, int]:
    """Number of indices of each tensor that the predicate reads."""
    ranks: dict[int, int] = {}
    for node in predicate.elements:
        if ranks.setdefault(node.position, len(node.indices)) != len(node.indices):
            raise PredicateError(f"predicate {predicate} gives t{node.position} {len(node.indices)} and {ranks[node.position]} indices")
    return ranks


def _grouped(text: str) -> str:
    """`text` so that it can stand beside an operator."""
    return text if isinstance(ast.parse(text, mode="eval").body, ast.Name | ast.Constant | ast.Call) else f"({text})"


def _all(conditions: Sequence[str]) -> str:
    return _joined(conditions, "&", neutral="True", decisive="False")


def _any(conditions: Sequence[str]) -> str:
    return _joined(conditions, "|", neutral="False", decisive="True")


def _joined(conditions: Sequence[str], sign: str, neutral: str, decisive: str) -> str:
    kept = [condition for condition in dict.fromkeys(conditions) if condition != neutral]
    if decisive in kept or not kept:
        return decisive if kept else neutral
    return kept[0] if len(kept) == 1 else f" {sign} ".join(map(_grouped, kept))


class _Elements:
    """Conditions at given positions. Each element of a tensor is read once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[Element, str] = {}

    def condition(self, tree: Expression) -> str:
        match tree:
            case Literal(value):
                return str(bool(value))
            case Element():
                return f"{self.number(tree)} != 0"
            case Not(operand):
                return f"{self.number(operand)} == 0"
            case Binary("&", left, right):
                return _all([self.condition(left), self.condition(right)])
            case Binary("|", left, right):
                return _any([self.condition(left), self.condition(right)])
            case Binary(sign, left, right):
                return f"{_grouped(self.number(left))} {sign} {_grouped(self.number(right))}"
        raise AssertionError(f"{tree} is no condition")

    def number(self, tree: Expression) -> str:
        match tree:
            case Literal(value):
                return str(int(value))
            case Index(name):
                return name
            case Size(position):
                return f"s{position}"
            case Element():
                return self._element(tree)
            case Binary("//" | "%" as sign, left, right):
                return f"{_FUNCTIONS[sign]}({self.number(left)}, {self.number(right)})"
            case Binary(sign, left, right):
                return f"{_grouped(self.number(left))} {sign} {_grouped(self.number(right))}"
        raise AssertionError(f"{tree} is no number")

    def _element(self, tree: Element) -> str:
        if tree not in self._names:
            terms = [
                f"tl.cast({self.number(index)}, tl.int64) * t{tree.position}_stride_{axis}"
                for axis, index in enumerate(tree.indices)
                if index != Literal(0)
            ]
            plain = all(isinstance(index, Index) for index in tree.indices)
            label = "_".join(index.name for index in tree.indices if isinstance(index, Index)) if plain else str(len(self._names))
            name = f"t{tree.position}_at_{label}"
            self.lines.append(f"{name} = element({' + '.join([f't{tree.position}', *terms])}, live)")
            self._names[tree] = name
        return self._names[tree]


@dataclass(frozen=True)
class _Text:
    """A number or condition of a kernel as source; literals fold."""

    code: str

    @property
    def number(self) -> int | None:
        return int(self.code) if self.code.lstrip("-").isdigit() else None

    def _infix(self, sign: str, other: _Text) -> _Text:
        folded = self._folded(sign, other)
        if folded is not None or (other.code == "0" and sign in "+-"):
            return folded or self
        return _Text(f"{_grouped(self.code)} {sign} {_grouped(other.code)}")

    def _call(self, sign: str, other: _Text) -> _Text:
        return self._folded(sign, other) or _Text(f"{_FUNCTIONS[sign]}({self.code}, {other.code})")

    def _folded(self, sign: str, other: _Text) -> _Text | None:
        return None if self.number is None or other.number is None else _Text(str(OPERATORS[sign](self.number, other.number)))

    __add__ = functools.partialmethod(_infix, "+")
    __sub__ = functools.partialmethod(_infix, "-")
    __mul__ = functools.partialmethod(_infix, "*")
    __lt__ = functools.partialmethod(_infix, "<")
    __le__ = functools.partialmethod(_infix, "<=")
    __gt__ = functools.partialmethod(_infix, ">")
    __ge__ = functools.partialmethod(_infix, ">=")
    __floordiv__ = functools.partialmethod(_call, "//")
    __mod__ = functools.partialmethod(_call, "%")

    def __and__(self, other: _Text) -> _Text:
        return _Text(_all([self.code, other.code]))

    def __or__(self, other: _Text) -> _Text:
        return _Text(_any([self.code, other.code]))


class _Bounds(Intervals[_Text]):
    """Bounds over q_first to q_last and k_first to k_last, for conjuncts that read no tensor."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def constant(self, value: int | bool) -> _Text:
        return _Text(str(value))

    def leaf(self, tree: Expression) -> Interval[_Text]:
        match tree:
            case Index("q" | "k" as name):
                return Interval(_Text(f"{name}_first"), _Text(f"{name}_last"))
            case Index(name):
                text = _Text(name)
                return Interval(text, text)
            case Size(position):
                text = _Text(f"s{position}")
                return Interval(text, text)
        raise AssertionError(f"{tree} is no number without tensors")

    def sign(self, value: _Text) -> int | None:
        return value.number

    def positive(self, value: _Text) -> _Text | None:
        condition = value > _Text("0")
        return None if condition.code == "False" else condition

    def extremes(self, values: Sequence[_Text]) -> tuple[_Text, _Text]:
        codes = [value.code for value in values]
        low, high = (functools.reduce(lambda a, b: f"tl.{f}({a}, {b})", codes) for f in ("minimum", "maximum"))
        return _Text(low), _Text(high)

    def remainders(self, low: _Text, high: _Text, divisor: _Text) -> tuple[_Text, _Text]:
        names = f"low_{len(self.lines)}", f"high_{len(self.lines)}"
        self.lines.append(f"{', '.join(names)} = modulo_bounds({low.code}, {high.code}, {divisor.code})")
        return _Text(names[0]), _Text(names[1])
