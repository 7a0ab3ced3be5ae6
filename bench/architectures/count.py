"""Counts what looks like attention or an FFN in a normalized graph, by rules of its own: a yardstick for the finders, not a part of them.

Attention-like: a fused attention operator, or a softmax that a product of two computed tensors leads to and whose result goes into another
product. FFN-like: a projection whose input a nonlinearity computes from other projections. A projection is a product with a matrix, or
a stack of matrices, computed from parameters alone, or a convolution that looks at one position.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from sptc.ir.region import Site
from sptc.passes.graph.frame import frames
from sptc.passes.graph.site import site_of
from sptc.passes.unit import Unit

_FUSED = ("aten.scaled_dot_product_attention",)
_SOFTMAX = ("aten.softmax", "aten._softmax")
_PRODUCTS = (
    "aten.matmul",
    "aten.mm",
    "aten.bmm",
    "aten.baddbmm",
    "aten.addmm",
    "aten.addbmm",
    "aten.linear",
    "aten.einsum",
    "aten._grouped_mm",
    "transformers.grouped_mm_fallback",
)
_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.convolution")
_NONLINEAR = re.compile(
    r"aten\.(relu|gelu|silu|sigmoid|tanh|softplus|elu|leaky_relu|hardswish|hardsigmoid|hardtanh|mish|selu|celu|relu6|erf|log_sigmoid|"
    r"prelu|glu|rrelu|threshold|softsign|exp|expm1)_?"
)


@dataclass(frozen=True)
class Place:
    """Something that looks like a region."""

    kind: str  # "attention" or "ffn"
    node: Node  # its softmax or fused operator; its last projection
    nodes: frozenset[Node]  # what lies between its products, these included
    module: str
    source: str


def places(unit: Unit) -> list[Place]:
    """All that looks like a region in a graph and in the checkpoint bodies in it, before the passes that change it."""
    return [place for frame in frames(unit.gm) for place in (*_attentions(frame.gm), *_ffns(frame.gm))]


def unmentioned(unit: Unit, looked_for: Iterable[Place]) -> list[Place]:
    """Those of `looked_for` that no region holds and no refusal of their kind stands in."""
    return [place for place in looked_for if not _mentioned(place, unit)]


def _mentioned(place: Place, unit: Unit) -> bool:
    if any(place.node in r.nodes or (place.kind == "ffn" and place.nodes & r.nodes) for r in unit.regions if r.kind == place.kind):
        return True
    near = [r for r in unit.refusals if r.kind in (place.kind, "graph")]
    return any(r.node in place.nodes or _same_line(place, r.site) for r in near)


def _same_line(place: Place, site: Site) -> bool:
    """Whether a refusal is about the same line of the same module, or of one around it."""
    inside = f"{place.module}.".startswith(f"{site.module}.") or not site.module
    return bool(site.source) and site.source == place.source and inside


def _attentions(gm: fx.GraphModule) -> Iterator[Place]:
    for node in gm.graph.nodes:
        name = _name(node)
        if name in _FUSED:
            yield _place("attention", node, {node})
        elif name in _SOFTMAX:
            before, sources = _reach(node, lambda n: n.all_input_nodes, _is_product)
            after, ends = _reach(node, lambda n: n.users, _is_product)
            if any(not _is_projection(n) for n in sources) and ends:
                yield _place("attention", node, {node, *before, *after, *sources, *ends})


def _ffns(gm: fx.GraphModule) -> Iterator[Place]:
    held: dict[Node, set[Node]] = {}
    for node in gm.graph.nodes:
        if not _NONLINEAR.fullmatch(_name(node)):
            continue
        before, sources = _reach(node, _inputs_of_pointwise, _is_any_projection)
        after, ends = _reach(node, lambda n, own=sources: _users_with(n, own), _is_any_projection)
        if sources:
            for end in ends:
                if _reads(end, {node, *after}):
                    held.setdefault(end, set()).update({node, *before, *after, *sources, end})
    for end, nodes in held.items():
        yield _place("ffn", end, nodes)


def _reads(product: Node, nodes: set[Node]) -> bool:
    """Whether a projection's input, and not its matrix, is among `nodes`."""
    return any(n in nodes and not _from_parameters(n) for n in product.all_input_nodes)


def _place(kind: str, node: Node, nodes: set[Node]) -> Place:
    site = site_of([node])
    return Place(kind, node, frozenset(nodes), site.module, site.source)


def _reach(start: Node, step: Callable[[Node], Iterable[Node]], stop: Callable[[Node], bool]) -> tuple[set[Node], set[Node]]:
    """(what is passed on the way, the nearest nodes of `stop`) from `start` on."""
    passed: set[Node] = set()
    ends: set[Node] = set()
    todo = list(step(start))
    while todo:
        node = todo.pop()
        if node in passed or node in ends:
            continue
        if stop(node):
            ends.add(node)
            continue
        passed.add(node)
        todo += step(node)
    return passed, ends


def _name(node: Node) -> str:
    return str(node.target.overloadpacket) if isinstance(node.target, torch._ops.OpOverload) else ""


_MOVES = re.compile(
    r"aten\.(view|reshape|_unsafe_view|unsqueeze|squeeze|flatten|unflatten|expand|permute|transpose|t|mT|contiguous|clone|to|_to_copy|type_as|"
    r"slice|chunk|split|split_with_sizes|unbind|select|dropout|layer_norm|rms_norm|group_norm|index|index_select|alias|view_as|movedim|"
    r"narrow|masked_fill|cat|stack|mul|add|sub|div|where)_?"
)


def _pointwise(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not _name(node) or not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
        return False
    return bool(_MOVES.fullmatch(_name(node))) or torch.Tag.pointwise in node.target.tags  # type: ignore[union-attr]


def _inputs_of_pointwise(node: Node) -> list[Node]:
    return node.all_input_nodes if _pointwise(node) else []


def _users_with(node: Node, sources: set[Node]) -> list[Node]:
    """What reads a value, but for sums with what comes from elsewhere than `sources`: a residual stream, where hidden units end."""
    users = [user for user in node.users if _pointwise(user) or _is_any_projection(user)]
    return [user for user in users if _name(user) not in ("aten.add", "aten.add_", "aten.sub") or _others_from(user, node, sources)]


def _others_from(total: Node, term: Node, sources: set[Node]) -> bool:
    others = [n for n in total.all_input_nodes if n is not term and not _from_parameters(n)]
    return all(n in sources or _reach(n, lambda m: m.all_input_nodes, _is_any_projection)[1] <= sources for n in others)


def _is_product(node: Node) -> bool:
    return _name(node) in _PRODUCTS


def _is_projection(node: Node) -> bool:
    """A product with parameters."""
    return _is_product(node) and any(_from_parameters(n) and len(_shape(n)) >= 2 for n in node.all_input_nodes)


def _is_any_projection(node: Node) -> bool:
    return _is_projection(node) or (_name(node) in _CONVOLUTIONS and all(size == 1 for size in _shape(node.args[1])[2:]))


def _shape(node: object) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _from_parameters(node: Node) -> bool:
    """Whether a tensor is computed from parameters alone, but for an index with which the data may choose a part of them."""
    todo, seen = [node], set[Node]()
    found = False
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            example = getattr(node.meta.get("grapharg"), "example", None)
            if "_dynamo_static_input_type" not in node.meta.get("tensor_dict", {}) and not isinstance(example, torch.nn.Parameter):
                return False
            found = True
        elif node.op == "get_attr":
            found = True
        elif _name(node) in ("aten.index", "aten.index_select"):
            todo.append(node.args[0])  # type: ignore[arg-type]
        else:
            todo += node.all_input_nodes
        if len(seen) > 64:
            return False
    return found
