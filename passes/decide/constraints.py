"""Which sizes the user allows no guard on: `mark_dynamic(x, dim, min=..., max=...)` asks for one compile for the whole range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint

from sptc.passes.graph.pattern import shape


def guardable(size: torch.SymInt, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a size that is computed from the inputs of the outermost graph `gm` may be compared by a guard."""
    tracing = TracingContext.try_get()
    if tracing is None:
        return True
    promised = set()
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        context = tracing.tensor_to_context.get(given) if isinstance(given, torch.Tensor) else None
        for length, constraint in zip(shape(node), getattr(context, "constraint_sizes", None) or (), strict=False):
            if isinstance(constraint, StrictMinMaxConstraint) and isinstance(length, torch.SymInt):
                promised |= length.node.expr.free_symbols
    return not promised & size.node.expr.free_symbols


def lower_bound(size: torch.SymInt) -> int:
    """The least value of a size within the ranges known so far."""
    return int(size.node.shape_env.bound_sympy(size.node.expr).lower)
