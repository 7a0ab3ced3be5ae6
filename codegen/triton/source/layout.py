"""Python source as syntax trees that keep comments and blank lines, and back: `ast` alone loses both."""

from __future__ import annotations

import ast
import bisect
import inspect
import io
import itertools
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

WIDTH = 110
_PRAGMA = re.compile(r"#\s*(noqa|type:|fmt:|ruff:|pragma|mypy:)")


@dataclass(frozen=True)
class Margin:
    """What stands around a statement or a parameter: comments above it, a comment at its end, whether a blank line precedes it."""

    above: tuple[str, ...] = ()
    beside: str = ""
    blank: bool = False


def margin(node: ast.AST) -> Margin:
    return getattr(node, "margin", Margin())


def set_margin(node: ast.AST, value: Margin) -> None:
    node.margin = value  # type: ignore[attr-defined]


def parse(source: str) -> ast.Module:
    """The tree of `source`; each statement and parameter has its `margin`."""
    tree = ast.parse(source)
    lines = source.splitlines()
    starts: dict[int, ast.AST] = {}
    for node in ast.walk(tree):  # breadth first: of two that start on one line, the outer one comes first
        if isinstance(node, ast.stmt | ast.arg):
            decorators = getattr(node, "decorator_list", [])
            starts.setdefault(min([node.lineno, *(d.lineno for d in decorators)]), node)
    order = sorted(starts)
    above: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or _PRAGMA.match(token.string):
            continue
        row = token.start[0]
        owner = _owner(tree, row)
        if not lines[row - 1].lstrip().startswith("#"):
            before = margin(owner).beside
            set_margin(owner, replace(margin(owner), beside=f"{before}; {token.string.lstrip('# ')}" if before else token.string))
        elif isinstance(owner, ast.stmt) and not hasattr(owner, "body"):  # inside an expression of several lines
            above.setdefault(owner.lineno, []).append(token.string)
        elif (position := bisect.bisect_right(order, row)) < len(order):
            above.setdefault(order[position], []).append(token.string)
    for row, node in starts.items():
        first = row - 1
        while first > 0 and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        blank = first > 0 and not lines[first - 1].strip()
        set_margin(node, replace(margin(node), above=tuple(above.get(row, ())), blank=blank))
    return tree


def _owner(tree: ast.Module, row: int) -> ast.AST:
    """The innermost statement or parameter on line `row`: the last one of those that begin there."""
    found: ast.AST = tree
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.arg) and node.lineno <= row <= (node.end_lineno or node.lineno):
            found = node
    return found


def rename_in_comments(tree: ast.AST, constants: Mapping[str, object]) -> None:
    """Write the values of constants into comments beside code, so that a shape `# [BLOCK, D]` reads `# [64, 128]`."""
    if not constants:
        return
    names = re.compile(r"\b(" + "|".join(map(re.escape, constants)) + r")\b")
    for node in ast.walk(tree):
        if beside := margin(node).beside:
            set_margin(node, replace(margin(node), beside=names.sub(lambda found: str(constants[found[1]]), beside)))


# Printing


def print_statements(statements: Sequence[ast.stmt], indent: int = 0) -> list[str]:
    """Lines of the statements, each at most about WIDTH columns long where brackets let it be broken."""
    lines: list[str] = []
    for i, statement in enumerate(statements):
        around = margin(statement)
        if around.blank and i > 0:
            lines.append("")
        pad = " " * indent
        lines += [pad + comment for comment in around.above]
        lines += _statement(statement, indent)
    return lines


def _statement(node: ast.stmt, indent: int) -> list[str]:
    pad, beside = " " * indent, margin(node).beside
    match node:
        case ast.FunctionDef():
            head = [f"{pad}@{_unparse(decorator)}" for decorator in node.decorator_list]
            return [*head, *_signature(node, indent), *print_statements(node.body, indent + 4)]
        case ast.If(test=test, body=body, orelse=orelse):
            return _if("if", node, test, body, orelse, indent)
        case ast.For(target=target, iter=iterable, body=body):
            head = wrapped(f"for {_unparse(target)} in {_unparse(iterable)}:", indent, beside)
            return [*head, *print_statements(body, indent + 4)]
        case ast.While(test=test, body=body):
            return [*wrapped(f"while {_unparse(test)}:", indent, beside), *print_statements(body, indent + 4)]
        case ast.Expr(value=ast.Constant(value=str() as text)):
            return docstring(text, indent)
        case ast.Assign(targets=[ast.Tuple(elts=elts)], value=value):
            return wrapped(f"{', '.join(map(_unparse, elts))} = {_unparse(value)}", indent, beside)
        case ast.Return(value=ast.Tuple(elts=elts)) if len(elts) > 1:
            return wrapped(f"return {', '.join(map(_unparse, elts))}", indent, beside)
    return wrapped(_unparse(node), indent, beside)


def _if(keyword: str, node: ast.stmt, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt], indent: int) -> list[str]:
    lines = [*wrapped(f"{keyword} {_unparse(test)}:", indent, margin(node).beside), *print_statements(body, indent + 4)]
    if len(orelse) == 1 and isinstance(orelse[0], ast.If) and not margin(orelse[0]).above:
        inner = orelse[0]
        return lines + _if("elif", inner, inner.test, inner.body, inner.orelse, indent)
    if orelse:
        lines += [" " * indent + "else:", *print_statements(orelse, indent + 4)]
    return lines


def docstring(text: str, indent: int = 4) -> list[str]:
    """Lines of a docstring; its own line breaks stay, and a line too long is filled."""
    pad, quotes = " " * indent, '"' * 3
    text = inspect.cleandoc(text.replace("\\", "\\\\").replace(quotes, "'" * 3))
    lines = [line for paragraph in re.split(r"\n(?=\n|[ -])", text) for line in _filled(paragraph, WIDTH - indent - 6)]
    if len(lines) == 1:
        return [f"{pad}{quotes}{lines[0]}{quotes}"]
    return [f"{pad}{quotes}{lines[0]}", *((pad + line).rstrip() for line in lines[1:]), f"{pad}{quotes}"]


def _filled(paragraph: str, width: int) -> list[str]:
    """The lines of a paragraph, as they are if they fit."""
    lines = paragraph.split("\n")
    if all(len(line) <= width for line in lines):
        return lines
    blank = [""] if not lines[0] else []
    return blank + textwrap.wrap(" ".join(lines).strip(), width, break_long_words=False, break_on_hyphens=False)


def _signature(node: ast.FunctionDef, indent: int) -> list[str]:
    """In one line if it fits; else parameters that have a comment on a line of their own, the others as many to a line as fit."""
    pad, inner = " " * indent, " " * (indent + 4)
    ending = ")" + (f" -> {_unparse(node.returns)}" if node.returns else "") + ":"
    lines, pending = [f"{pad}def {node.name}("], ""
    for _, group in itertools.groupby(node.args.args, key=lambda arg: getattr(arg, "lineno", None)):
        texts, around = "", Margin()
        for arg in group:
            own = margin(arg)
            around = Margin(around.above + own.above, around.beside or own.beside)
            texts += f" {_unparse(arg)},"
        joined = len(inner) + len(pending) + len(texts) <= WIDTH
        if pending and not (joined and around == Margin()):
            lines.append(inner + pending)
            pending = ""
        lines += [inner + comment for comment in around.above]
        pending = f"{pending}{texts}" if pending else texts[1:]
        if around.beside:
            lines.append(f"{inner}{pending}  {around.beside}")
            pending = ""
    lines += [inner + pending] if pending else []
    whole = f"{pad}def {node.name}({', '.join(map(_unparse, node.args.args))}{ending}"
    plain = not any(margin(arg).above or margin(arg).beside for arg in node.args.args)
    return [whole] if plain and len(whole) <= WIDTH else [*lines, pad + ending]


def _unparse(node: ast.AST) -> str:
    """`ast.unparse` with double quotes where that is simple."""
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')


def wrapped(text: str, indent: int, beside: str = "") -> list[str]:
    """`text` as lines: broken at brackets where it would not fit in one. A comment that does not fit beside it goes above."""
    pad = " " * indent
    comment = f"  {beside}" if beside else ""
    if "\n" in text or len(pad + text + comment) <= WIDTH:
        return [pad + text + comment]
    above = [pad + beside] if beside else []
    if len(pad + text) <= WIDTH:
        return [*above, pad + text]
    return above + _broken(text, pad)


def _broken(text: str, pad: str, bracketed: bool = False) -> list[str]:
    """`text` broken until its lines fit: at commas, at operators where it stands in brackets, else at its last wide brackets."""
    if len(pad + text) <= WIDTH:
        return [pad + text]
    if bracketed and len(operands := list(_operands(text))) > 1:
        return [line for operand in operands for line in _broken(operand, pad, bracketed=True)]
    pair = _outer_brackets(text)
    if pair is None:
        return [pad + text]
    start, end = pair
    head, inside, tail = text[: start + 1], text[start + 1 : end], text[end:]
    inner = pad + "    "
    parts = list(_split(inside))
    if len(inner + inside) <= WIDTH or len(parts) == 1:
        middle = _broken(inside, inner, bracketed=True)
    else:
        middle = [line for part in parts for line in _broken(part + ",", inner, bracketed=True)]
    return [pad + head, *middle, pad + tail]


def _operands(text: str) -> Iterator[str]:
    """The operands of `text`, each but the first after its operator; at the outermost operators that are logical, else additive."""
    depths = {position: depth for position, _, depth in _brackets(text)}
    for operators in (" and ", " or "), (" | ",), (" & ",), (" + ", " - "):
        cuts = [i for i in range(1, len(text)) if depths.get(i) == 0 and text.startswith(operators, i)]
        if cuts:
            yield from (text[i:j].strip() for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True))
            return


def _outer_brackets(text: str) -> tuple[int, int] | None:
    """The last outermost pair of brackets that holds something worth a line of its own."""
    found, open_at = None, 0
    for position, character, depth in _brackets(text):
        if character in "([{" and depth == 1:
            open_at = position
        elif character in ")]}" and depth == 0 and position > open_at + 1 and (found is None or position - open_at > 20):
            found = open_at, position
    return found


def _split(text: str) -> Iterator[str]:
    start = 0
    for position, character, depth in _brackets(text):
        if character == "," and depth == 0:
            yield text[start:position].strip()
            start = position + 1
    if text[start:].strip():
        yield text[start:].strip()


def _brackets(text: str) -> Iterator[tuple[int, str, int]]:
    """Position, character and depth after it, of what stands outside strings."""
    depth, quote = 0, ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
            yield position, character, depth
