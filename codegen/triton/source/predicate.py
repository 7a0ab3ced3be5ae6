"""A mask predicate as Triton functions: element by element, and over whole ranges of queries and keys by interval arithmetic.

The second is what lets a kernel skip the test in blocks where the predicate holds throughout, and whole blocks where it holds nowhere:
it is `Predicate.bounds` for one pair of ranges and the conjuncts that read no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sptc.ir.predicate import OPPOSITE, Binary, Element, Expression, Index, Literal, Not, Predicate, PredicateError, Size, parse, positive

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
        truths = [bounds.truth(positive(part.tree)) for part in chosen]
        certain, nowhere = _all([truth.certain for truth in truths]), _any([truth.nowhere for truth in truths])
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
    whole = text.isidentifier() or text.isdigit() or _is_call(text)
    return text if whole else f"({text})"


def _is_call(text: str) -> bool:
    """Whether `text` is one name with one pair of parentheses after it."""
    name, _, rest = text.partition("(")
    if not name.replace(".", "").isidentifier() or not rest.endswith(")"):
        return False
    depth = 1
    for character in rest[:-1]:
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return False
    return True


def _all(conditions: Sequence[str]) -> str:
    return _joined(conditions, "&", neutral="True", decisive="False")


def _any(conditions: Sequence[str]) -> str:
    return _joined(conditions, "|", neutral="False", decisive="True")


def _joined(conditions: Sequence[str], operator: str, neutral: str, decisive: str) -> str:
    kept = [condition for condition in dict.fromkeys(conditions) if condition != neutral]
    if decisive in kept or not kept:
        return decisive if kept else neutral
    return kept[0] if len(kept) == 1 else f" {operator} ".join(map(_grouped, kept))


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
            case Binary(operator, left, right):
                return f"{_grouped(self.number(left))} {operator} {_grouped(self.number(right))}"
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
            case Binary("//" | "%" as operator, left, right):
                return f"{_FUNCTIONS[operator]}({self.number(left)}, {self.number(right)})"
            case Binary(operator, left, right):
                return f"{_grouped(self.number(left))} {operator} {_grouped(self.number(right))}"
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
class _Truth:
    """Texts: it certainly holds everywhere in the ranges; it certainly holds nowhere."""

    certain: str
    nowhere: str


@dataclass(frozen=True)
class _Interval:
    """Texts of the least and greatest value, and what must be true for them to be right."""

    low: str
    high: str
    given: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return self.low == self.high


_UNKNOWN = _Truth("False", "False")


class _Bounds:
    """Conditions over ranges, by interval arithmetic."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def truth(self, tree: Expression) -> _Truth:
        match tree:
            case Literal(value):
                return _Truth(str(bool(value)), str(not value))
            case Binary("&", left, right):
                a, b = self.truth(left), self.truth(right)
                return _Truth(_all([a.certain, b.certain]), _any([a.nowhere, b.nowhere]))
            case Binary("|", left, right):
                a, b = self.truth(left), self.truth(right)
                return _Truth(_any([a.certain, b.certain]), _all([a.nowhere, b.nowhere]))
            case Binary(operator, left, right):
                return self._comparison(operator, self.interval(left), self.interval(right))
        raise AssertionError(f"{tree} is no condition without tensors")

    def _comparison(self, operator: str, a: _Interval | None, b: _Interval | None) -> _Truth:
        if a is None or b is None:
            return _UNKNOWN
        if operator == "!=":
            equal = self._comparison("==", a, b)
            return _Truth(equal.nowhere, equal.certain)
        given = (*a.given, *b.given)
        if operator == "==":
            certain = [_compare(a.low, "==", b.high), _compare(a.high, "==", b.low)]
            nowhere = _any([_compare(a.high, "<", b.low), _compare(a.low, ">", b.high)])
            return _Truth(_all([*certain, *given]), _all([nowhere, *given]))
        if operator in (">", ">="):
            certain_one, nowhere = _compare(a.low, operator, b.high), _compare(a.high, OPPOSITE[operator], b.low)
        else:
            certain_one, nowhere = _compare(a.high, operator, b.low), _compare(a.low, OPPOSITE[operator], b.high)
        return _Truth(_all([certain_one, *given]), _all([nowhere, *given]))

    def interval(self, tree: Expression) -> _Interval | None:
        """The bounds of a number; None where there is no telling."""
        match tree:
            case Literal(value):
                return _Interval(str(int(value)), str(int(value)))
            case Index("q" | "k" as name):
                return _Interval(f"{name}_first", f"{name}_last")
            case Index(name):
                return _Interval(name, name)
            case Size(position):
                return _Interval(f"s{position}", f"s{position}")
            case Binary(operator, left, right):
                a, b = self.interval(left), self.interval(right)
                return None if a is None or b is None else self._arithmetic(operator, a, b)
        raise AssertionError(f"{tree} is no number without tensors")

    def _arithmetic(self, operator: str, a: _Interval, b: _Interval) -> _Interval | None:
        given = (*a.given, *b.given)
        if operator == "+":
            return _Interval(_infix(a.low, "+", b.low), _infix(a.high, "+", b.high), given)
        if operator == "-":
            return _Interval(_infix(a.low, "-", b.high), _infix(a.high, "-", b.low), given)
        if operator == "*":
            return self._product(a, b, given)
        if not b.exact:
            return None
        given = (*given, _compare(b.low, ">", "0"))
        if "False" in given:
            return None
        if operator == "//":
            return _Interval(_call("floor_divide", a.low, b.low), _call("floor_divide", a.high, b.low), given)
        if a.exact:
            value = _call("floor_modulo", a.low, b.low)
            return _Interval(value, value, given)
        low, high = self._name("low"), self._name("high")
        self.lines.append(f"{low}, {high} = modulo_bounds({a.low}, {a.high}, {b.low})")
        return _Interval(low, high, given)

    def _product(self, a: _Interval, b: _Interval, given: tuple[str, ...]) -> _Interval:
        if a.exact and not b.exact:
            a, b = b, a
        if a.exact:
            value = _infix(a.low, "*", b.low)
            return _Interval(value, value, given)
        if b.exact and b.low.lstrip("-").isdigit():
            low, high = (a.low, a.high) if int(b.low) >= 0 else (a.high, a.low)
            return _Interval(_infix(low, "*", b.low), _infix(high, "*", b.low), given)
        products = [_infix(x, "*", y) for x in (a.low, a.high) for y in dict.fromkeys((b.low, b.high))]
        return _Interval(_extreme("tl.minimum", products), _extreme("tl.maximum", products), given)

    def _name(self, stem: str) -> str:
        return f"{stem}_{len(self.lines)}"


def _number(text: str) -> int | None:
    return int(text) if text.lstrip("-").isdigit() else None


def _compare(left: str, operator: str, right: str) -> str:
    a, b = _number(left), _number(right)
    if a is not None and b is not None:
        return str({"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b}[operator])
    return f"{_grouped(left)} {operator} {_grouped(right)}"


def _infix(left: str, operator: str, right: str) -> str:
    a, b = _number(left), _number(right)
    if a is not None and b is not None:
        return str({"+": a + b, "-": a - b, "*": a * b}[operator])
    if right == "0" and operator in "+-":
        return left
    if left == "0" and operator == "-":
        return f"-{_grouped(right)}"
    return f"{_grouped(left)} {operator} {_grouped(right)}"


def _call(function: str, x: str, y: str) -> str:
    a, b = _number(x), _number(y)
    if a is not None and b is not None:
        return str(a // b if function == "floor_divide" else a % b)
    return f"{function}({x}, {y})"


def _extreme(function: str, texts: Sequence[str]) -> str:
    result = texts[0]
    for text in texts[1:]:
        result = f"{function}({result}, {text})"
    return result
