"""Operators that may have no finite value, or no finite slope, where an FFN's row is left out.

A row of zeros stands for it there, and what is added to it makes any number of that. Behind such an operator it would become NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch.fx import Node

from sptc.passes.graph.elementwise import pointwise
from sptc.passes.graph.pattern import COPIES, VIEWS, argument, base_name, dtype, plain_number

_FINITE = frozenset(
    {
        *("abs", "add", "addcmul", "asinh", "atan", "ceil", "celu", "clamp", "clamp_max", "clamp_min", "clip", "cos", "cosh", "elu"),
        *("eq", "erf", "erfc", "exp", "exp2", "expm1", "floor", "fmax", "fmin", "ge", "gelu", "gt", "hardshrink", "hardsigmoid"),
        *("hardswish", "hardtanh", "le", "leaky_relu", "lerp", "logaddexp", "logical_and", "logical_not", "logical_or", "logical_xor"),
        *("lt", "masked_fill", "maximum", "minimum", "mish", "mul", "multiply", "ne", "neg", "relu", "relu6", "round", "rsub", "selu"),
        *("sigmoid", "sign", "silu", "sin", "sinh", "softplus", "softshrink", "square", "sub", "tan", "tanh", "threshold", "trunc"),
        "where",
    }
)
"""Operators with a value and a slope everywhere, in every operand. Of one that is not here it is taken that they may have none."""
_ABOVE = frozenset({"sqrt", "rsqrt", "reciprocal", "log", "log2", "log10", "log1p"})  # finite above zero
_QUOTIENTS = frozenset({"div", "true_divide", "floor_divide", "fmod", "remainder"})
_POWERS = frozenset({"pow", "float_power"})
_EPSILONS = {"layer_norm": 4, "rms_norm": 3}
_SAME_SIGNS = COPIES | VIEWS | {f"aten.{name}" for name in ("sqrt.default", "expand.default", "mean.dim", "sum.dim_IntList")}
_NOT_NEGATIVE = frozenset({"abs", "square", "exp", "exp2", "sigmoid", "relu", "softplus", "var", "softmax", "cosh"})


def may_be_infinite(node: Node, tokens: Container[Node], written: Container[Node]) -> bool:
    """Whether an operator may be infinite, or its gradient, where rows of what it computes from `tokens` are left out.

    Not where what must be positive is: a sum of a positive number and what is not negative, as the variance and epsilon of a norm.

    `written`: values whose memory is written to, which may be other than they were computed.
    """
    name = _function(node)
    if name in _EPSILONS:
        return argument(node, _EPSILONS[name], "eps", 1e-5) == 0
    if name in _FINITE or not pointwise(node):
        return False
    exponent = plain_number(node.args[1]) if name in _POWERS else None
    if name in _POWERS and (_exceeds(node.args[0], 0.0) or (exponent is not None and exponent >= 1 and exponent.is_integer())):
        return False
    bound = _not_negative if name == "log1p" or (exponent is not None and exponent >= 1) else _positive
    risky = {1} if name in _QUOTIENTS else {0} if name in _ABOVE or exponent is not None else range(len(node.args))
    operands = [node.args[i] for i in risky]
    return any(isinstance(n, Node) and n in tokens and not _at_least(n, bound, written) for n in operands)


def _at_least(node: Node, bound: Callable[[Node, Container[Node]], bool], written: Container[Node]) -> bool:
    """Whether what a node is, but for its shape, dtype and scale, has a property; not of what is written to."""
    while base_name(node) in _SAME_SIGNS and node not in written and _is_real(node):
        node = node.args[0]  # type: ignore[assignment]
    return node not in written and bound(node, written)


def _positive(node: Node, written: Container[Node]) -> bool:
    """Whether a value is at least some positive number, not so small that slopes there exceed its dtype."""
    name, kind = _function(node), dtype(node)
    least = torch.finfo(kind).max ** -0.5 if kind is not None and kind.is_floating_point else 0.0
    if name == "add" and not node.kwargs:
        return any(_exceeds(a, least) and _term(b, written) for a, b in (node.args[:2], node.args[1::-1]))  # type: ignore[misc]
    return name in ("clamp", "clamp_min") and _exceeds(argument(node, 1, "min"), least)


def _not_negative(node: Node, written: Container[Node]) -> bool:
    name = _function(node)
    if name in _NOT_NEGATIVE or _positive(node, written):
        return True
    if name == "pow":
        exponent = plain_number(node.args[1])
        return exponent is not None and exponent % 2 == 0
    if name in ("mul", "add", "div") and not node.kwargs:
        a, b = node.args[:2]
        return (name == "mul" and a is b) or (_term(a, written) and _term(b, written))
    return False


def _term(given: Any, written: Container[Node]) -> bool:
    """Whether an operand, a number or a node, is not negative."""
    number = plain_number(given)
    if number is not None:
        return number >= 0
    return isinstance(given, Node) and _at_least(given, _not_negative, written)


def _exceeds(given: Any, least: float) -> bool:
    number = plain_number(given)
    return number is not None and number > least


def _is_real(node: Node) -> bool:
    """Whether it is no cast to integers, which makes 0 of what is between 0 and 1."""
    kind = dtype(node)
    return kind is not None and kind.is_floating_point


def _function(node: Node) -> str:
    """The name of an operator of ATen's without its overload, "" for anything else."""
    namespace, _, rest = base_name(node).partition(".")
    return rest.partition(".")[0] if namespace == "aten" else ""
