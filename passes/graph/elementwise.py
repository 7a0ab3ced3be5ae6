"""ATen operators that compute each element from those at the same place: what an activation is made of, to run on any of its units."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sptc.passes.graph.pattern import base_name, shape

_SUMS = frozenset({"add", "sub", "rsub", "neg"})
_PRODUCTS, _QUOTIENTS = frozenset({"mul", "multiply"}), frozenset({"div", "true_divide"})
_POWERS = frozenset({"square", "pow", "reciprocal"})
_FUNCTIONS = frozenset(
    {
        *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish", "hardsigmoid", "hardtanh"),
        *("sigmoid", "tanh", "exp", "erf", "sqrt", "rsqrt", "abs", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "clip"),
    }
)
_ELEMENTWISE = _SUMS | _PRODUCTS | _QUOTIENTS | _POWERS | _FUNCTIONS
_OVERLOADS = frozenset({"default", "Tensor", "Scalar", "Tensor_Scalar", "Tensor_Tensor", "Tensor_mode"})


def elementwise(node: Node) -> bool:
    """Whether the operator is one of an activation's, in place or not. Tags do not tell: torch gives `hardswish` none."""
    return _base(node) in _ELEMENTWISE


def pointwise(node: Node) -> bool:
    """Whether each element is computed from those at the same place: by an operator of an activation's, or one that torch tags so."""
    return elementwise(node) or (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags)


def function(node: Node) -> bool:
    """Whether it is a function with a name of its own, such as a gate has, and no arithmetic."""
    return _base(node) in _FUNCTIONS


def bends(node: Node) -> bool:
    """Whether it makes of linear operands what is not linear: all do but sums, and products with a number."""
    name = _base(node)
    if name in _SUMS:
        return False
    if name in _PRODUCTS:
        return all(shape(factor) for factor in node.args)
    return name not in _QUOTIENTS or bool(shape(node.args[1])) or "rounding_mode" in node.kwargs


def functional(target: Any) -> Any:
    """The operator that computes what this one does, and writes to no argument."""
    if not target._schema.is_mutable:
        return target
    name = target._schema.name.partition("::")[2].removesuffix("_")
    return getattr(getattr(torch.ops.aten, name), target._overloadname)


def _base(node: Node) -> str:
    namespace, _, rest = base_name(node).partition(".")
    name, _, overload = rest.partition(".")
    return name if namespace == "aten" and overload in _OVERLOADS else ""
