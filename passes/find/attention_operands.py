"""q, k and v of a product as the tensors a sparse op wants: unscaled, untransposed, with grouped heads and caches not materialised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sptc.passes.graph.pattern import argument, dtype, op, same_size, shape, transparent
from sptc.passes.graph.site import called
from sptc.passes.mask.mask import Refused
from sptc.passes.mask.reader import Reader

_COPIES = frozenset({"aten.contiguous.default", "aten.clone.default", "aten.alias.default"})
_RESHAPES = frozenset(
    {"aten.reshape.default", "aten.view.default", "aten._unsafe_view.default", "aten.flatten.using_ints", "aten.unflatten.int"}
)


@dataclass(frozen=True)
class Operand:
    """A tensor, and the nodes seen through on the way to it."""

    node: Node
    passed: tuple[Node, ...] = ()

    def before(self, node: Any) -> Operand:
        """One step back, to the argument `node`."""
        assert isinstance(node, Node)
        return Operand(node, (*self.passed, self.node))


def query_of(factor: Node, reader: Reader) -> tuple[Operand, float]:
    """q and its scale, from the first factor of the scores."""
    return _unscaled(Operand(factor), reader)


def key_of(factor: Node, reader: Reader) -> tuple[Operand, float]:
    """k [..., m, d] and its scale, from the second factor [..., d, m] of the scores.

    Raises:
        Refused: the factor is no transposition of a tensor [..., m, d].
    """
    operand, scale = _unscaled(_uncopied(Operand(factor)), reader)
    operand = _uncopied(operand)
    if not _swaps_last(operand.node):
        raise Refused(
            "layout", factor, f"the keys {called(operand.node)} are laid out as [..., size, length] and never as [..., length, size]"
        )
    operand, more = _unscaled(operand.before(operand.node.args[0]), reader)
    return operand, scale * more


def _unscaled(operand: Operand, reader: Reader) -> tuple[Operand, float]:
    """The operand before it was multiplied by constants, and their product. One scaled in place has no tensor from before any more."""
    scale = 1.0
    while op(operand.node) in ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"):
        a, b = operand.node.args[:2]
        number = reader.constant(b)
        if number is None or number <= 0 or not isinstance(a, Node) or dtype(a) != dtype(operand.node):
            break
        if len(shape(a)) != len(shape(operand.node)):  # a number of more dimensions
            break
        scale *= 1 / number if ".div." in op(operand.node) else number
        operand = operand.before(a)
    return operand, scale


def _uncopied(operand: Operand) -> Operand:
    while op(operand.node) in _COPIES:
        operand = operand.before(operand.node.args[0])
    return operand


def _swaps_last(node: Node) -> bool:
    rank = len(shape(node))
    if op(node) == "aten.transpose.int":
        return {int(d) % rank for d in node.args[1:]} == {rank - 1, rank - 2}  # type: ignore[arg-type]
    if op(node) == "aten.permute.default":
        dims: Any = node.args[1]
        return [d % rank for d in dims] == [*range(rank - 2), rank - 1, rank - 2]
    return op(node) in ("aten.mT.default", "aten.t.default")


def without_empty(operand: Operand) -> Operand:
    """The operand without the empty tensors that it is concatenated with (a cache before its first token)."""
    here = _uncopied(operand)
    if op(here.node) != "aten.cat.default":
        return operand
    parts: Any = here.node.args[0]
    filled = [part for part in parts if not any(same_size(size, 0) for size in shape(part))]
    return without_empty(here.before(filled[0])) if len(filled) == 1 else operand


def grouped(operand: Operand) -> Operand | None:
    """k or v [b, h_kv, m, d] before each head was repeated for the query heads that share it; None if it was not."""
    here = _uncopied(operand)
    name = op(here.node)
    if name in _RESHAPES:
        inner = _uncopied(here.before(here.node.args[0]))
        return _expanded(inner, here.node) if op(inner.node) == "aten.expand.default" else None
    source: Any = here.node.args[0] if here.node.args else None
    if name == "aten.repeat_interleave.self_int" and argument(here.node, 2, "dim") in (1, -3) and len(shape(source)) == 4:
        return here.before(source)
    if name == "aten.expand.default" and len(shape(source)) == 4 and same_size(shape(source)[1], 1):
        return here.before(source) if _same_but(shape(source), shape(here.node), 1) else None
    return None


def _expanded(inner: Operand, whole: Node) -> Operand | None:
    """[b, h_kv, m, d] from its form [b, h_kv, g, m, d], expanded along g, which `whole` [b, h_kv * g, m, d] flattens."""
    unsqueezed: Any = inner.node.args[0]
    if op(unsqueezed) != "aten.unsqueeze.default" or len(shape(unsqueezed)) != 5 or len(shape(whole)) != 4:
        return None
    source: Any = unsqueezed.args[0]
    single = same_size(shape(source)[1], 1)  # with one head, where it is repeated makes no difference
    if int(unsqueezed.args[1]) % 5 != 2 and not (single and int(unsqueezed.args[1]) % 5 == 1):
        return None
    if not _same_but(shape(source), shape(whole), 1):
        return None
    return inner.before(unsqueezed).before(source)


def _same_but(a: tuple[Any, ...], b: tuple[Any, ...], dim: int) -> bool:
    return len(a) == len(b) and all(i == dim or same_size(x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)))


def split_heads(operand: Operand) -> Operand | None:
    """The [b, h, n, d] node of which the operand [b * h, n, d] is a reshaped form; None if there is none."""
    while transparent(operand.node):
        operand = operand.before(operand.node.args[0])
    if op(operand.node) not in _RESHAPES:
        return None
    source: Any = operand.node.args[0]
    return operand.before(source) if _merges(shape(source), shape(operand.node)) else None


def heads_of(operand: Operand) -> int | None:
    """h, if the operand is [b * h, n, d] made from [b, h, n, d], or from [n, b, h * d] as nn.MultiheadAttention does it."""
    four = split_heads(operand)
    if four is not None:
        heads = shape(four.node)[1]
        return heads if isinstance(heads, int) else None
    node = operand.node
    if op(node) != "aten.transpose.int" or {int(d) % 3 for d in node.args[1:]} != {0, 1}:  # type: ignore[arg-type]
        return None
    view: Any = node.args[0]
    if op(view) not in _RESHAPES or len(shape(view.args[0])) != 3:
        return None
    whole, width = shape(view.args[0])[-1], shape(node)[-1]
    return whole // width if isinstance(whole, int) and isinstance(width, int) and whole % width == 0 else None


def merged_heads(y: Node) -> Node | None:
    """The [b, h, n, d] form of y [b * h, n, d], if that is all y is used for."""
    users = list(y.users)
    return users[0] if len(users) == 1 and op(users[0]) in _RESHAPES and _merges(shape(users[0]), shape(y)) else None


def _merges(four: tuple[Any, ...], three: tuple[Any, ...]) -> bool:
    return len(four) == 4 and len(three) == 3 and same_size(four[2], three[1]) and same_size(four[3], three[2])
