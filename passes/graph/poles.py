"""Operators that have no finite value, or no finite slope, at zero: rows of zeros in place of others would become NaN behind them."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch.fx import Node

from sptc.passes.graph.pattern import COPIES, VIEWS, argument, base_name, plain_number

_POLES = frozenset(
    f"aten.{name}.default"
    for name in ("sqrt", "rsqrt", "reciprocal", "log", "log2", "log10", "logit", "acosh", "digamma", "lgamma", "special_entr")
)
_QUOTIENTS = frozenset(
    {
        f"aten.{name}.{overload}"
        for name in ("div", "true_divide", "floor_divide", "fmod", "remainder")
        for overload in ("Tensor", "Tensor_mode")
    }
    | {"aten.floor_divide.default", "aten.atan2.default", "aten.xlogy.Tensor"}
)
_EPSILONS = {"aten.layer_norm.default": 4, "aten.rms_norm.default": 3}
_SAME_ZEROS = COPIES | VIEWS | {"aten.sqrt.default", "aten.expand.default"}


def pole_at_zero(node: Node, tokens: Container[Node]) -> bool:
    """Whether rows of zeros in what an operator computes from `tokens` may make it infinite, or its gradient.

    A sum with a positive number, and what is not less than one, is taken to be none: the epsilon of a norm.
    """
    name = base_name(node)
    if name in _EPSILONS:
        return argument(node, _EPSILONS[name], "eps", 1e-5) == 0
    if name in _POLES:
        risky = node.args[0]
    elif name in _QUOTIENTS:
        risky = node.args[1]
    elif name.startswith("aten.pow."):
        exponent = plain_number(node.args[1])
        if exponent is not None and exponent >= 1:
            return False
        risky = node.args[0]
    else:
        return False
    return isinstance(risky, Node) and risky in tokens and not _positive(risky)


def _positive(node: Node) -> bool:
    while base_name(node) in _SAME_ZEROS:
        node = node.args[0]  # type: ignore[assignment]
    name = base_name(node)
    if name in ("aten.add.Tensor", "aten.add.Scalar"):
        return any(_is_positive(term) for term in node.args)
    if name.startswith(("aten.clamp.", "aten.clamp_min.")):
        return _is_positive(argument(node, 1, "min"))
    return False


def _is_positive(given: Any) -> bool:
    number = plain_number(given)
    return number is not None and number > 0
