"""How passes read a graph: operators by name, shapes, values seen through views, and projections."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_float, has_free_unbacked_symbols, statically_known_true

from sptc.ir.region import Lora, Projection

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
EINSUM = "aten.einsum.default"


def aten(*names: str) -> frozenset[str]:
    """Overloads of ATen's as `op` names them."""
    return frozenset(f"aten.{name}" for name in names)


# Operators whose result is their first argument under another shape, stride or dtype.
VIEWS = aten(
    *("view.default", "reshape.default", "_unsafe_view.default", "_reshape_alias.default", "flatten.using_ints", "unflatten.int"),
    *("unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "view_as.default"),
)
COPIES = aten(
    *("contiguous.default", "clone.default", "alias.default", "detach.default", "lift_fresh_copy.default", "to.dtype"),
    *("to.device", "to.dtype_layout", "to.other", "_to_copy.default", "type_as.default"),
)
# `detach` stops gradients, so it is a copy for reading values and a border for regions.
TRANSPARENT = COPIES - {"aten.detach.default"}
_MODE_CHANGES = {"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"}
_REALS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def op(node: Any) -> str:
    """The operator's name such as "aten.linear.default"; "" for anything that is not a call of one."""
    if isinstance(node, Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return ""


def base_name(node: Any) -> str:
    """The operator's name, that of "aten.add_.Tensor" being "aten.add.Tensor": in a graph both give the same value."""
    return op(node).replace("_.", ".")


def value(node: Any) -> Any:
    """The fake tensor, size or number that a node computes; None when unknown."""
    return node.meta.get("val") if isinstance(node, Node) else node


def exchanged(held: Any, nodes: Mapping[Node, Any]) -> Any:
    """`held` (dataclasses, tuples and sets of nodes) with other nodes, or whatever stands for nodes."""
    if isinstance(held, Node):
        return nodes.get(held, held)
    if isinstance(held, tuple | frozenset):
        return type(held)(exchanged(item, nodes) for item in held)
    if is_dataclass(held) and not isinstance(held, type):
        return replace(held, **{f.name: exchanged(getattr(held, f.name), nodes) for f in fields(held)})
    return held


def shape(node: Any) -> tuple[Any, ...]:
    """The shape of a node's tensor (ints and SymInts); () when it is no tensor."""
    val = value(node)
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


def dtype(node: Any) -> torch.dtype | None:
    val = value(node)
    return val.dtype if isinstance(val, torch.Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard to a symbolic graph."""
    return bool(statically_known_true(a == b))


def plain_number(arg: Any) -> float | None:
    """The number that an argument is; None where data decides it.

    With dynamic=True Dynamo makes symbols of a module's numbers too: one that a region's form depends on is made a constant by a guard.
    """
    known = value(arg)
    if isinstance(known, torch.SymFloat) and not has_free_unbacked_symbols(known):
        return guard_float(known)
    return float(known) if isinstance(known, int | float) and not isinstance(known, bool) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def requires_grad(node: Node) -> bool:
    """Whether the value carried a gradient when the graph was captured (fakes of make_fx do not say)."""
    meta = node.meta.get("tensor_meta")
    if meta is not None and hasattr(meta, "requires_grad"):
        return bool(meta.requires_grad)
    grapharg = node.meta.get("grapharg")
    return bool(getattr(getattr(grapharg, "example", None), "requires_grad", False))


def through(node: Node, ops: Iterable[str]) -> Iterator[Node]:
    """`node`, then what it was computed from, as long as it is one of `ops` (first argument)."""
    names = frozenset(ops)
    yield node
    while op(node) in names and isinstance(node.args[0], Node):
        node = node.args[0]
        yield node


def origin(node: Node, ops: Iterable[str] = TRANSPARENT) -> Node:
    """What `node` was before copies and casts."""
    *_, last = through(node, ops)
    return last


def transparent(node: Any) -> bool:
    """Whether a node is its first argument again, up to the rounding of a cast between floating dtypes (to integers or fp8 it is not)."""
    if op(node) not in TRANSPARENT:
        return False
    before, after = dtype(node.args[0]), dtype(node)
    return before == after or (before in _REALS and after in _REALS)


def under_views(node: Node) -> Node:
    """What a node is again, in another shape or floating dtype."""
    while op(node) in VIEWS or transparent(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_mode_change(node: Node) -> bool:
    """Whether a node switches autocast, grad mode or the like: no region may span one."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _MODE_CHANGES


def keeps_last_axis(node: Node) -> bool:
    """Whether a view leaves the last axis as it is."""
    before, after = shape(node.args[0]), shape(node)
    return bool(before) and bool(after) and same_size(before[-1], after[-1])


def units(node: Node) -> Iterator[Node]:
    """`node`, then what it was before copies and views that keep the last axis."""
    yield node
    while transparent(node) or (op(node) in VIEWS and keeps_last_axis(node)):
        node = node.args[0]  # type: ignore[assignment]
        yield node


def match_projection(node: Node) -> Projection | None:
    """`node` as y = x W^T + bias (+ LoRA), or as a range of the features of one; None if it is nothing of the kind."""
    return _match_slice(node) or _match_lora(node) or _match_dense(node)


def _match_dense(node: Node) -> Projection | None:
    chain = list(units(node))
    last = chain[-1]
    name = op(last)
    if name == "aten.add.Tensor" and not last.kwargs:
        return _match_bias_sum(chain)
    bias: Any = None
    if name == "aten.linear.default":
        x, weight, bias, transposed = last.args[0], last.args[1], argument(last, 2, "bias"), False
    elif name == "aten.addmm.default" and not last.kwargs:
        (bias, x, weight), transposed = last.args, True
        if len(shape(bias)) != 1:
            return None
    elif name in ("aten.matmul.default", "aten.mm.default"):
        (x, weight), transposed = last.args, True
    else:
        return None
    if not (isinstance(x, Node) and isinstance(weight, Node)) or len(shape(weight)) != 2:
        return None
    nodes = set(chain)
    if op(weight) in ("aten.t.default", "aten.transpose.int", "aten.permute.default") and len(shape(weight.args[0])) == 2:
        transposed = not transposed
        nodes.add(weight)
        weight = weight.args[0]  # type: ignore[assignment]
    if not is_weight(weight):  # type: ignore[arg-type]
        return None
    flat = list(takewhile(lambda n: dtype(n) == dtype(x), units(x)))  # a cast is the region's own: products take operands of one dtype
    if len(flat) > 1 and name != "aten.linear.default":
        nodes.update(flat[:-1])
        x = flat[-1]
    return Projection(x, node, weight, transposed, bias, None, None, frozenset(nodes))


def is_weight(node: Node) -> bool:
    """Whether a matrix is an input of the graph, or computed from parameters and buffers alone: not from activations."""
    if node.op in ("placeholder", "get_attr"):
        return True
    pending, seen = [node], {node}
    while pending:
        inner = pending.pop()
        if inner.op == "placeholder" and "_dynamo_static_input_type" not in inner.meta.get("tensor_dict", {}):
            return False
        fresh = [n for n in inner.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += fresh
        if len(seen) > _LONGEST_WEIGHT:
            return False
    return True


_LONGEST_WEIGHT = 64  # nodes that compute a weight from parameters, such as a weight norm


def _match_bias_sum(chain: list[Node]) -> Projection | None:
    """A product without a bias, then `+ bias`."""
    a, b = chain[-1].args
    for term, bias in ((a, b), (b, a)):
        if not (isinstance(term, Node) and isinstance(bias, Node)) or len(shape(bias)) != 1:
            continue
        inner = _match_dense(term)
        if inner is not None and inner.bias is None and same_size(shape(bias)[0], shape(term)[-1]):
            return Projection(inner.x, chain[0], inner.weight, inner.transposed, bias, None, None, inner.nodes | set(chain))
    return None


def _match_lora(node: Node) -> Projection | None:
    """base + scaling * B(A(dropout(x))), as PEFT writes it."""
    chain = list(units(node))
    last = chain[-1]
    if op(last) != "aten.add.Tensor" or last.kwargs:
        return None
    a, b = last.args
    for base_node, term in ((a, b), (b, a)):
        if not (isinstance(base_node, Node) and isinstance(term, Node)):
            continue
        base = _match_dense(base_node)
        if base is None or len(shape(base_node)) != len(shape(term)) or not all(map(same_size, shape(base_node), shape(term))):
            continue
        adapter = _match_adapter(term, base.x)
        if adapter is not None:
            lora, inner = adapter
            return Projection(base.x, node, base.weight, base.transposed, base.bias, None, lora, base.nodes | inner | set(chain))
    return None


def match_adapters(node: Node) -> tuple[Projection, tuple[Lora, ...]] | None:
    """`node` as a projection with two or more low-rank adapters, which no region has: all of it without them, and the adapters in order."""
    terms: list[Node] = []
    nodes: set[Node] = set()
    here = node
    while (base := _match_dense(here)) is None:
        chain = list(units(here))
        nodes.update(chain)
        last = chain[-1]
        if op(last) != "aten.add.Tensor" or last.kwargs or not all(isinstance(arg, Node) for arg in last.args):
            return None
        here, term = last.args  # type: ignore[assignment]
        terms.append(term)  # type: ignore[arg-type]
    found = [_match_adapter(term, base.x) for term in reversed(terms)] if len(terms) > 1 else []
    adapters = [adapter for adapter in found if adapter is not None]
    if not adapters or len(adapters) < len(found):
        return None
    whole = replace(base, y=node, nodes=base.nodes.union(nodes, *(inner for _, inner in adapters)))
    return whole, tuple(lora for lora, _ in adapters)


def _match_adapter(term: Node, x: Node) -> tuple[Lora, frozenset[Node]] | None:
    chain = list(units(term))
    scaling: float | Node = 1.0
    if op(chain[-1]) == "aten.mul.Tensor":
        product, factor = chain[-1].args
        if isinstance(factor, (int, float)):
            scaling = float(factor)
        elif isinstance(factor, Node) and isinstance(value(factor), torch.SymFloat):  # dynamic=True makes numbers symbolic
            scaling = factor
        else:
            return None
        if not isinstance(product, Node):
            return None
        chain += units(product)
    up = _match_dense(chain[-1])
    if up is None or up.bias is not None or up.transposed:
        return None
    low = _match_dense(up.x)
    if low is None or low.bias is not None or low.transposed:
        return None
    inner = list(units(low.x))
    dropout_p = 0.0
    if inner[-1] is not origin_of_units(x) and op(inner[-1]) == "aten.dropout.default":
        dropout, p, train = inner[-1].args
        if train and p:
            dropout_p = float(p)  # type: ignore[arg-type]
        if isinstance(dropout, Node):
            inner += units(dropout)
    if origin_of_units(x) is not inner[-1]:
        return None
    return Lora(up.x, low.weight, up.weight, scaling, dropout_p), frozenset(chain) | up.nodes


def origin_of_units(node: Node) -> Node:
    """What `node` was before copies and views that keep the last axis."""
    *_, last = units(node)
    return last


def before_dropout(node: Node) -> Node:
    """What `node` was before copies, views that keep the last axis, and dropout."""
    last = origin_of_units(node)
    while op(last) == "aten.dropout.default":
        last = origin_of_units(last.args[0])  # type: ignore[arg-type]
    return last


def _match_slice(node: Node) -> Projection | None:
    """A range of a projection's features: one part of chunk, split, or a slice of the last axis."""
    chain = list(units(node))
    last = chain[-1]
    if op(last) == "aten.slice.Tensor":
        whole, nodes = last.args[0], [last]
        if argument(last, 1, "dim", 0) not in (-1, len(shape(last)) - 1) or argument(last, 4, "step", 1) != 1:
            return None
        start = argument(last, 2, "start", None) or 0
    elif last.op == "call_function" and last.target is operator.getitem and isinstance(last.args[0], Node):
        parts = last.args[0]
        if op(parts) not in ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes"):
            return None
        whole, nodes = parts.args[0], [parts, last]
        if argument(parts, 2, "dim", 0) not in (-1, len(shape(last)) - 1):
            return None
        sizes = [part.shape[-1] for part in value(parts)] if value(parts) is not None else None
        if sizes is None:
            return None
        start = sum(sizes[: int(last.args[1])])  # type: ignore[call-overload]
    else:
        return None
    if not isinstance(whole, Node) or not isinstance(start, int):
        return None
    base = match_projection(whole)
    if base is None or base.rows is not None or not isinstance(shape(node)[-1], int):
        return None
    if start < 0:
        start = max(0, start + int(shape(whole)[-1]))
    rows = (start, start + int(shape(node)[-1]))
    return Projection(base.x, node, base.weight, base.transposed, base.bias, rows, base.lora, base.nodes | set(nodes) | set(chain))
