"""How the rows of logits get from a projection to the loss, read backwards: what flattened, turned or cut them is undone on labels.

The axis of the classes is followed on the way, so that labels, which have no such axis, can be brought back row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sptc.ir.region import Pad, Permute, Reshape, Step
from sptc.passes.graph.pattern import VIEWS, argument, keeps_last_axis, op, same_size, shape, value
from sptc.passes.graph.site import called


class UnreadableRows(Exception):
    """Why the way of the rows can't be undone."""


class Rows:
    """Walks back from a loss's input [rows, classes, ...] and collects the steps that undo what happened to its rows.

    Attributes:
        axis: which dimension of the node at hand is that of the classes.
        steps: what takes labels from the rows of the loss to those of the node at hand.
    """

    def __init__(self, known: Sequence[Node]) -> None:
        """`known`: nodes whose sizes can be read where labels are brought back."""
        self.axis = 1
        self.steps: list[Step] = []
        self._known = known

    def back(self, node: Node) -> bool:
        """Undo `node` if it moves or cuts rows, or cuts classes off; False, and nothing is undone, if it does anything else.

        Raises:
            UnreadableRows: it moves rows in a way that sizes and constants don't tell.
        """
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, Node):
            return False
        name, last = op(node), self.axis == len(shape(node)) - 1
        if (order := order_of(node)) is not None:
            before = order[self.axis]
            rows = [i for i in order if i != before]  # of the labels' dimensions, which source's each is
            self.axis = before
            if rows != sorted(rows):
                self.steps.append(Permute(tuple(rows.index(i) for i in sorted(rows))))
        elif name in VIEWS and last and keeps_last_axis(node) and len(shape(source)) > 1:
            self.axis = len(shape(source)) - 1
            self.steps.append(Reshape(self._sizes(self.lead(source))))
        elif name == "aten.slice.Tensor":
            pad = _pad(node, self.axis)
            if pad is not None:
                self.steps.append(pad)
        else:
            return False
        return True

    def lead(self, node: Node) -> tuple[Any, ...]:
        """The sizes of the node at hand without its classes: those of its labels."""
        return tuple(size for i, size in enumerate(shape(node)) if i != self.axis)

    def _sizes(self, wanted: Sequence[Any]) -> tuple[int | tuple[Node, int] | None, ...]:
        found = tuple(size if isinstance(size, int) else self._dimension(size) for size in wanted)
        if found.count(None) > 1:
            raise UnreadableRows("the sizes of the logits are not those of inputs")
        return found

    def _dimension(self, size: torch.SymInt) -> tuple[Node, int] | None:
        for node in self._known:
            for dim, other in enumerate(shape(node)):
                if isinstance(value(node), torch.Tensor) and same_size(size, other):
                    return node, dim
        return None


def sized(steps: Iterable[Step]) -> list[Node]:
    """The nodes whose sizes bringing labels back needs."""
    sizes = (size for step in steps if isinstance(step, Reshape) for size in step.sizes)
    return [size[0] for size in sizes if isinstance(size, tuple)]


def brought_back(labels: Tensor, steps: Iterable[Step], fill: int | bool, tensors: Mapping[Node, Tensor]) -> Tensor:
    """Labels, or a mask, of the loss's rows as those of the tokens, [N].

    Args:
        labels: of the rows of the loss, of any shape.
        steps: what undoes what happened to the rows of the tokens on their way to the loss.
        fill: the label of a row that was cut off.
        tensors: of the nodes `sized(steps)`.
    """
    for step in steps:
        if isinstance(step, Reshape):
            labels = labels.reshape([tensors[s[0]].shape[s[1]] if isinstance(s, tuple) else -1 if s is None else s for s in step.sizes])
        elif isinstance(step, Permute):
            labels = labels.permute(step.order)
        else:
            around = [0, 0] * (labels.dim() - 1 - step.dim) + [step.before, step.after]
            labels = torch.constant_pad_nd(labels, around, fill)
    return labels.reshape(-1)


def order_of(node: Node) -> tuple[int, ...] | None:
    """Which dimension of its argument each dimension of a transposition is; None for other nodes."""
    dims, name = len(shape(node)), op(node)
    if name == "aten.permute.default":
        return tuple(int(d) % dims for d in node.args[1])  # type: ignore[union-attr, arg-type]
    if name not in ("aten.transpose.int", "aten.t.default") or dims < 2:
        return None
    a, b = (0, 1) if name == "aten.t.default" else (int(d) % dims for d in node.args[1:3])  # type: ignore[arg-type]
    order = list(range(dims))
    order[a], order[b] = b, a
    return tuple(order)


def _pad(node: Node, axis: int) -> Pad | None:
    """What undoes a slice; None if no row was cut off."""
    before, after = shape(node.args[0]), shape(node)
    dim = int(argument(node, 1, "dim", 0)) % len(after)
    if dim == axis or same_size(before[dim], after[dim]):
        return None
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    if isinstance(start, int) and start < 0:
        start = _number(before[dim] + start)
        start = max(0, start) if isinstance(start, int) else None  # one before the first row is cut off
    rest = _number(before[dim] - after[dim])
    if not isinstance(start, int) or rest is None or step != 1:
        raise UnreadableRows(f"{called(node)} takes a part of the logits' rows whose place is not a constant")
    return Pad(dim - (dim > axis), start, rest - start)


def _number(size: Any) -> int | None:
    """A size that is constant, if only after its symbols cancel out."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else None
