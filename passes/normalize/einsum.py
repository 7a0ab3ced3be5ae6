"""Write an einsum of two tensors as the batched matrix product that it is, so that attention spelled with einsum is found like any other.

"bqhd,bkhd->bhqk" becomes permute(q) @ permute(k).mT: what `torch.einsum` itself does, with the layouts as nodes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx import Node

from sptc.passes.graph.pattern import EINSUM, op, same_size, shape, value

aten = torch.ops.aten


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
    writer = _Writer(node)
    left = writer.permuted(form.left, form.left_labels, form.batch + form.rows + form.inner)
    if form.right_labels.index(form.inner) > form.right_labels.index(form.columns):
        right = writer.permuted(form.right, form.right_labels, form.batch + form.columns + form.inner)
        right = writer.call(right, aten.transpose.int, right, -2, -1)
    else:
        right = writer.permuted(form.right, form.right_labels, form.batch + form.inner + form.columns)
    product = writer.call(node, aten.matmul.default, left, right)
    y = writer.permuted(product, form.batch + form.rows + form.columns, form.out_labels)
    y.meta.update(node.meta)
    node.replace_all_uses_with(y)
    node.graph.erase_node(node)


class _Writer:
    """Inserts nodes before an einsum that carry the dtype and the gradient of what they come from, where an autocast block chose it too."""

    def __init__(self, einsum: Node) -> None:
        self._einsum = einsum
        self._fake_mode = detect_fake_mode([value(einsum)])

    def call(self, like: Node, target: Any, *args: Any) -> Node:
        """A call whose result has the dtype of `like`, and a gradient if `like` has one."""
        with self._einsum.graph.inserting_before(self._einsum):
            node = self._einsum.graph.call_function(target, args)
        node.meta.update(self._einsum.meta)
        kind = value(like).dtype
        assert self._fake_mode is not None
        with self._fake_mode, torch.no_grad():
            val: torch.Tensor = target(*(value(arg).to(kind) if isinstance(arg, Node) else arg for arg in args))
        node.meta["val"] = val
        if "tensor_meta" in like.meta:
            node.meta["tensor_meta"] = like.meta["tensor_meta"]._replace(shape=val.shape, stride=val.stride())
        return node

    def permuted(self, node: Node, labels: str, to: str) -> Node:
        order = [labels.index(label) for label in to]
        return node if order == sorted(order) else self.call(node, aten.permute.default, node, order)
