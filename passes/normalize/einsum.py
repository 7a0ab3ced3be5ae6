"""Write an einsum of two tensors as the batched matrix product that it is, so that attention spelled with einsum is found like any other.

"bqhd,bkhd->bhqk" becomes permute(q) @ permute(k).mT: what `torch.einsum` itself does, with the layouts as nodes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx import Node

from sptc.passes.graph.insert import insert, keep_gradient
from sptc.passes.graph.pattern import EINSUM, op, same_size, shape


def lower_einsum(gm: fx.GraphModule) -> None:
    """Replace, in one graph and in place, the einsums that contract one dimension of two tensors and keep one of each beside the batch."""
    for node in [node for node in gm.graph.nodes if op(node) == EINSUM]:
        form = _form(node)
        if form is not None:
            _write(node, form)


@dataclass(frozen=True)
class _Form:
    """out[batch, rows, columns] = sum of left[batch, rows, inner] right[batch, inner, columns], each in a layout of its own."""

    left: Node
    right: Node
    left_labels: str
    right_labels: str
    out_labels: str
    batch: str
    rows: str
    columns: str
    inner: str


def _form(node: Node) -> _Form | None:
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    labels = _labels(equation, [len(shape(operand)) for operand in operands]) if len(operands) == 2 else None
    if labels is None:
        return None
    a, b, out = (set(part) for part in labels)
    sums, firsts, seconds = (a & b) - out, a - b, b - a
    if not (len(sums) == len(firsts) == len(seconds) == 1) or not firsts | seconds <= out or not a & b & out:
        return None
    inner, first, second = (next(iter(one)) for one in (sums, firsts, seconds))
    if not same_size(shape(operands[0])[labels[0].index(inner)], shape(operands[1])[labels[1].index(inner)]):
        return None  # einsum would broadcast a dimension of size 1
    batch = "".join(label for label in labels[2] if label in a & b)
    if labels[2].index(first) < labels[2].index(second):
        return _Form(operands[0], operands[1], *labels, batch, first, second, inner)
    return _Form(operands[1], operands[0], labels[1], labels[0], labels[2], batch, second, first, inner)


def _labels(equation: str, ranks: Sequence[int]) -> tuple[str, str, str] | None:
    """One letter a dimension of both operands and the result, those of an ellipsis as digits; None for forms without it or with repeats."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    parts = operands.split(",")
    if not arrow or len(parts) != 2:
        return None
    if "..." in equation:
        spread = {rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)}
        if not all("..." in part for part in (*parts, out)) or len(spread) != 1 or max(spread) > 9:
            return None
        digits = "123456789"[: max(spread)]
        parts, out = [part.replace("...", digits) for part in parts], out.replace("...", digits)
    first, second = parts
    return (first, second, out) if all(len(set(part)) == len(part) for part in (first, second, out)) else None


def _write(node: Node, form: _Form) -> None:
    batch, columns_last = form.batch, form.right_labels.index(form.inner) > form.right_labels.index(form.columns)

    def product(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """The result, and what it is computed from on the way: each of the dtype of `left`, of `right` or of the einsum."""
        left = _permuted(left, form.left_labels, batch + form.rows + form.inner)
        if columns_last:
            stored = _permuted(right, form.right_labels, batch + form.columns + form.inner)
            right = stored.transpose(-2, -1)
        else:
            stored = right = _permuted(right, form.right_labels, batch + form.inner + form.columns)
        y = left @ right
        return left, stored, right, y, _permuted(y, batch + form.rows + form.columns, form.out_labels)

    alike = ("einsum", node.args[0], form.left_labels, form.right_labels)
    made = insert(node, product, form.left, form.right, alike=alike)
    for new, like in zip(made, (form.left, form.right, form.right, node, node), strict=True):
        keep_gradient(new, like)
    *_, y = made
    y.meta.update(node.meta)
    node.replace_all_uses_with(y)
    node.graph.erase_node(node)


def _permuted(x: Tensor, labels: str, to: str) -> Tensor:
    """`x`, whose dimensions are called `labels`, in the order `to`."""
    order = [labels.index(label) for label in to]
    return x if order == sorted(order) else x.permute(order)
