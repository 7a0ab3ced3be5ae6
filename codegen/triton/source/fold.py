"""Binding the constants of a template: expressions and branches that they decide disappear."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from sptc.codegen.triton.spec import Constant
from sptc.ir.errors import SptcError


class SpecializeError(SptcError, ValueError):
    """A template and its constants or hooks do not fit together."""


_CALLS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "int": int,
    "float": float,
    "bool": bool,
    "tl.cdiv": lambda a, b: -(-a // b),
    "triton.cdiv": lambda a, b: -(-a // b),
    "triton.next_power_of_2": lambda n: 1 << (n - 1).bit_length() if n > 0 else 0,
    "tl.constexpr": lambda value: value,
}


class Unknown:
    """The value of an expression that is no constant (None is one)."""


def value_of(node: ast.AST) -> Any:
    """The constant that a folded expression is, else `Unknown`."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as text)]):
            return float(text)
        case ast.Tuple(elts=elts):
            values = [value_of(element) for element in elts]
            return Unknown if Unknown in values else tuple(values)
    return Unknown


def literal(value: Constant | None) -> ast.expr:
    """The expression of a constant: a negative number as one, so that it binds as it should; infinities as `float("inf")`."""
    if isinstance(value, float) and value - value != 0.0:
        return ast.Call(ast.Name("float", ast.Load()), [ast.Constant(str(value))], [])
    if isinstance(value, int | float) and not isinstance(value, bool) and (value < 0 or str(value) == "-0.0"):
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def fold(function: ast.FunctionDef, constants: Mapping[str, Constant], where: str) -> None:
    """Bind `constants` in the body of `function`, in place.

    Args:
        where: names the template in errors.

    Raises:
        SpecializeError: a count of a slice is no constant, a constant is assigned to, an assertion fails.
    """
    function.body = _Fold(constants, where).block(function.body) or [ast.Pass()]
    ast.fix_missing_locations(function)


class _Fold(ast.NodeTransformer):
    def __init__(self, constants: Mapping[str, Constant], where: str) -> None:
        self.bound: dict[str, Constant] = dict(constants)
        self.where = where

    def fail(self, node: ast.AST, message: str) -> NoReturn:
        raise SpecializeError(f"{self.where}, line {getattr(node, 'lineno', '?')}: {message}")

    # Statements

    def block(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for statement in statements:
            result += self.statement(statement)
            if result and isinstance(result[-1], ast.Return | ast.Break | ast.Continue):
                break
        return result

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        match node:
            case ast.If():
                return self.branch(node)
            case ast.For():
                return self.loop(node)
            case ast.While():
                node.test = self.visit(node.test)
                node.body = self.block(node.body) or [ast.Pass()]
                return [] if value_of(node.test) is False else [node]
            case ast.Assert():
                return self.assertion(node, node.test, node.msg)
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="static_assert"), args=[test, *rest])):
                return self.assertion(node, test, rest[0] if rest else None)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
                node.value = self.visit(value)
                constant = value_of(node.value)
                if ast.unparse(annotation) == "tl.constexpr" and isinstance(constant, bool | int | float | str):
                    self.bound[name] = constant
                    return []
                return [node]
            case ast.Assign(targets=[target]):
                node.value = self.visit(node.value)
                node.targets = [self.visit(target)]
                return [node]
        return [self.generic_visit(node)]  # type: ignore[list-item]

    def branch(self, node: ast.If) -> list[ast.stmt]:
        node.test = self.visit(node.test)
        test = value_of(node.test)
        if test is not Unknown:
            return self.block(node.body if test else node.orelse)
        bound = dict(self.bound)
        node.body = self.block(node.body)
        self.bound = dict(bound)  # what one branch names constexpr means nothing after it
        node.orelse = self.block(node.orelse)
        self.bound = bound
        if not node.body and not node.orelse:
            return []
        node.body = node.body or [ast.Pass()]
        return [node]

    def loop(self, node: ast.For) -> list[ast.stmt]:
        node.iter = self.visit(node.iter)
        node.target = self.visit(node.target)
        node.body = self.block(node.body)
        return [node] if node.body else []

    def assertion(self, node: ast.stmt, test: ast.expr, message: ast.expr | None) -> list[ast.stmt]:
        shown, value = ast.unparse(test), value_of(self.visit(copy.deepcopy(test)))
        if value is Unknown:
            return [self.generic_visit(node)]  # type: ignore[list-item]
        if not value:
            reason = value_of(self.visit(message)) if message is not None else ""
            names = sorted({n.id for n in ast.walk(test) if isinstance(n, ast.Name) and n.id in self.bound})
            values = ", ".join(f"{name} = {self.bound[name]!r}" for name in names)
            self.fail(node, f"{shown} does not hold with {values}{f': {reason}' if isinstance(reason, str) and reason else ''}")
        return []

    # Expressions

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.bound:
            return node
        if not isinstance(node.ctx, ast.Load):
            self.fail(node, f"{node.id!r} is a constant and cannot be assigned to")
        return ast.copy_location(literal(self.bound[node.id]), node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        node.operand = self.visit(node.operand)
        return node if value_of(node.operand) is Unknown else self.evaluated(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        node.left, node.right = self.visit(node.left), self.visit(node.right)
        left, right = value_of(node.left), value_of(node.right)
        return _simplified(node, left, right) if left is Unknown or right is Unknown else self.evaluated(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        decides = isinstance(node.op, ast.Or)  # the truth that decides the whole: True for or, False for and
        values: list[ast.expr] = []
        for operand in node.values:
            operand = self.visit(operand)
            constant = value_of(operand)
            if constant is Unknown:
                values.append(operand)
            elif bool(constant) == decides:
                return operand  # what stands before it is free of effects: tests are
        if not values:
            return ast.Constant(not decides)
        return values[0] if len(values) == 1 else ast.BoolOp(node.op, values)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        operands = [self.visit(operand) for operand in (node.left, *node.comparators)]
        node.left, node.comparators = operands[0], operands[1:]
        return node if Unknown in map(value_of, operands) else self.evaluated(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        test = value_of(self.visit(node.test))
        if test is not Unknown:
            return self.visit(node.body if test else node.orelse)
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = ast.unparse(node.func)
        if isinstance(node.func, ast.Attribute):
            node.func = self.visit(node.func)
        node.args = [argument for given in node.args for argument in self.argument(given)]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        values = [value_of(argument) for argument in node.args]
        if name in _CALLS and node.args and not node.keywords and Unknown not in values:
            return literal(self.computed(node, _CALLS[name], *values))
        return node

    def argument(self, node: ast.expr) -> list[ast.expr]:
        """An argument of a call, or those that `*name[:N]` stands for."""
        match node:
            case ast.Starred(
                value=ast.Subscript(value=ast.Name(id=name), slice=ast.Slice(lower=None, upper=ast.expr() as upper, step=None))
            ):
                count = value_of(self.visit(upper))
                if type(count) is not int:
                    self.fail(node, f"{ast.unparse(node)} needs a constant integer, got {_shown(count)}")
                return [ast.copy_location(ast.Name(f"{name}_{i}", ast.Load()), node) for i in range(count)]
            case ast.Starred():
                self.fail(node, f"{ast.unparse(node)}: only name[:N] with a constant N can be passed with a star")
        return [self.visit(node)]

    def evaluated(self, node: ast.expr) -> ast.expr:
        """An operator on constants, as Python has it."""
        code = compile(ast.fix_missing_locations(ast.Expression(node)), self.where, "eval")
        return literal(self.computed(node, eval, code, {"__builtins__": {"float": float}}))

    def computed(self, node: ast.AST, function: Callable[..., Any], *values: Any) -> Any:
        try:
            return function(*values)
        except (ArithmeticError, TypeError, ValueError) as error:
            self.fail(node, f"{ast.unparse(node)}: {error}")


def _simplified(node: ast.BinOp, left: Any, right: Any) -> ast.expr:
    """Without an integer 1 or 0 that changes nothing."""
    match node.op:
        case ast.Mult() | ast.FloorDiv() if type(right) is int and right == 1:
            return node.left
        case ast.Add() | ast.Sub() if type(right) is int and right == 0:
            return node.left
        case ast.Mult() if type(left) is int and left == 1:
            return node.right
        case ast.Add() if type(left) is int and left == 0:
            return node.right
    return node


def _shown(value: Any) -> str:
    return "an expression" if value is Unknown else repr(value)
