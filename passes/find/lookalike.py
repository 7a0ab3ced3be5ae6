"""What has the shape of a region and yet none of its forms: found by following values alone, so that nothing goes without a word.

The finders know forms: which operators may stand between the products of a region. Here only the products count. A softmax between two
products of computed tensors is attention, whatever else stands between them; a nonlinearity between two products with weights is an FFN.
Those that no finder took become refusals, which name the first operator that no form has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx import Node

from sptc.ir.region import Refusal
from sptc.passes.graph.boundary import alias_sets, written_by
from sptc.passes.graph.elementwise import elementwise
from sptc.passes.graph.pattern import VIEWS, base_name, before_dropout, is_weight, keeps_last_axis, op, shape, transparent
from sptc.passes.graph.site import called, site_of

_PRODUCTS = frozenset({"aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.baddbmm.default", "aten.addmm.default"})
_LINEAR = frozenset({"aten.linear.default", "aten.einsum.default", "aten._grouped_mm.default", *_PRODUCTS})
_CONVOLUTIONS = frozenset({"aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.convolution.default"})
_SUMS = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})
_TURNS = frozenset({"aten.transpose.int", "aten.permute.default", "aten.mT.default", "aten.t.default", "aten.numpy_T.default"})
_CHOICES = frozenset({"aten.index.Tensor", "aten.index_select.default", "aten.embedding.default"})
_BENDS = re.compile(  # functions that are no line, and no arithmetic, which norms are made of
    r"aten\.(relu|relu6|hardtanh|leaky_relu|elu|selu|celu|softplus|gelu|silu|mish|hardswish|hardsigmoid|sigmoid|tanh|exp|expm1|erf|glu|"
    r"prelu|_prelu_kernel|rrelu|log_sigmoid|threshold|hardshrink|softshrink|softsign|clamp|clamp_min|clamp_max|maximum|minimum|fmax|fmin|"
    r"sin|cos|tan|asin|acos|atan|atan2|arctan2|sinh|cosh|asinh|acosh|atanh|erfc|erfinv|sinc|exp2|log|log2|log10|log1p|logaddexp|xlogy|"
    r"round|floor|ceil|trunc|fix|frac|sign|sgn|copysign|heaviside|remainder|fmod|hypot|logit|lgamma|digamma)\.(default|Tensor|Scalar)"
)
_MANY = 8  # sources of a value; from there on it is the residual stream


class Flow:
    """How values move through one graph: along its edges, and from what writes to a tensor to what reads it later."""

    def __init__(self, graph: fx.Graph) -> None:
        self._writes: dict[Node, list[Node]] = {}  # operators that wrote to a node's memory
        self._reads: dict[Node, list[Node]] = {}  # nodes whose memory an operator writes to
        written = [(node, target) for node in graph.nodes for target in written_by(node)]
        aliases = alias_sets(graph) if written else {}
        for writer, target in written:
            for node in graph.nodes:
                if node is not writer and aliases[node] == aliases[target]:
                    self._writes.setdefault(node, []).append(writer)
                    self._reads.setdefault(writer, []).append(node)

    def before(self, node: Node) -> list[Node]:
        return [*node.all_input_nodes, *self._writes.get(node, ())]

    def after(self, node: Node) -> list[Node]:
        return [*node.users, *self._reads.get(node, ())]


def score_product(node: Node) -> bool:
    """Whether a node is a product of two computed tensors, such as q k^T; a product with a weight is a projection."""
    return (op(node) in _PRODUCTS or op(node) == "aten.einsum.default") and not projects(node)


def projects(node: Any) -> bool:
    """Whether a node multiplies with weights: one matrix, a stack of them, a part that the data chooses, or in an operator of its own."""
    return weight_of(node) is not None


def weight_of(node: Any) -> Node | None:
    """The weight that a projection multiplies with, computed from parameters; None for anything else."""
    name = op(node)
    if name in _CONVOLUTIONS:
        weight: Any = node.args[1]
        return weight if all(size == 1 for size in shape(weight)[2:]) else None
    if name not in _LINEAR and (not name or name.startswith(("aten.", "sptc."))):
        return None
    factors = [n for n in node.all_input_nodes if len(shape(n)) >= 2]
    weights = [n for n in factors if is_weight(_whole(n))]
    if len(weights) == len(factors):  # an input of the graph may be either
        weights = node.args[1:2] if name == "aten.linear.default" else [n for n in weights if _is_static(_whole(n))]
    return weights[0] if len(weights) == 1 and len(factors) > 1 else None


def _is_static(node: Node) -> bool:
    return node.op != "placeholder" or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def _whole(node: Node) -> Node:
    """The stack of matrices of which `node` is a choice."""
    while op(node) in _CHOICES or transparent(node) or op(node) in _TURNS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def between_products(softmax: Node, flow: Flow, plain: Callable[[Node], bool]) -> Node | None:
    """For a softmax that a score product leads to and whose weights reach a product: the operator in between that no form has.

    None if it is no attention at all: a gate, a router, a pooling. `softmax` itself is the answer if all in between is `plain`.
    """
    before, after = _path(softmax, flow.before, score_product), _path(softmax, flow.after, score_product)
    if before is None or after is None:
        return None
    return next((node for node in (*before[:-1], *after[:-1]) if not plain(node)), softmax)


def _path(start: Node, step: Callable[[Node], Iterable[Node]], goal: Callable[[Node], bool]) -> list[Node] | None:
    """The shortest way to a goal that passes no projection; None without one."""
    came: dict[Node, Node] = {}
    queue = [start]
    for here in queue:
        if here is not start and goal(here):
            path = [here]
            while came[path[-1]] is not start:
                path.append(came[path[-1]])
            return path[::-1]
        if here is start or not (projects(here) or here.op in ("placeholder", "output")):
            for node in step(here):
                if node not in came and node is not start:
                    came[node] = here
                    queue.append(node)
    return None


@dataclass(frozen=True)
class _Like:
    """Something like an FFN: its last projection, and the nodes from its nonlinearity to it."""

    down: Node
    path: tuple[Node, ...]


def ffn_refusals(gm: fx.GraphModule, known: Collection[Node], strangers: Collection[Node]) -> Iterator[Refusal]:
    """Refusals for what is like an FFN and reaches none of the nodes `known`, which regions hold and refusals are about.

    Those among them that a refusal calls strangers in the FFN that reads them may end another one, which then has a refusal of its own.
    """
    sources: dict[Node, frozenset[Node]] = {}
    for node in gm.graph.nodes:
        sources[node] = _sources(node, sources)
    bent = {node for node in gm.graph.nodes if (bending := _bending(node)) and any(projects(n) for n in sources[bending])}
    said: set[Node] = set()  # hidden values; one refusal is enough for all that reads one, such as an adapter beside its layer
    for like in _likes(gm, bent, sources):
        hidden = before_dropout(like.path[-1])
        if hidden in said:
            continue
        spoken = any(node in known for node in like.path) or (like.down in known and like.down not in strangers)
        if not spoken and not _same_hidden(like, known):
            said.add(hidden)
            yield _refusal(like)


def _bending(node: Node) -> Node | None:
    """What decides how `node` bends values, if it does: itself, or the condition of a choice, which for a mask no projection computes."""
    name = base_name(node)
    if name == "aten.where.self":
        return node.args[0]  # type: ignore[return-value]
    return node if _BENDS.fullmatch(name) else None


def _same_hidden(like: _Like, known: Collection[Node]) -> bool:
    """Whether the finder spoke of the projection's input, by a node that enters it on another way."""
    return any(n in known for node in like.path for n in node.all_input_nodes)


def _sources(node: Node, sources: Mapping[Node, frozenset[Node]]) -> frozenset[Node]:
    """What a value comes from: the nearest projections, products and inputs. Parameters are no source."""
    if node.op == "placeholder":
        return frozenset() if len(shape(node)) < 2 or _is_static(node) else frozenset({node})
    if projects(node) or score_product(node):
        return frozenset({node})
    every = frozenset[Node]().union(*(sources[n] for n in node.all_input_nodes))
    return every if len(every) <= _MANY else frozenset(sorted(every)[-_MANY:])


def _likes(gm: fx.GraphModule, bent: Collection[Node], sources: Mapping[Node, frozenset[Node]]) -> Iterator[_Like]:
    """Each projection that a bent value reaches, once, with the shortest way to it."""
    paths: dict[Node, tuple[Node, ...]] = {node: (node,) for node in bent}
    for node in gm.graph.nodes:
        ways = [paths[n] for n in node.all_input_nodes if n in paths and not _stays_in_stream(node, n, sources)]
        if not ways or node in bent:
            continue
        shortest = min(ways, key=len)
        if projects(node):
            if shortest[-1] is not weight_of(node):
                yield _Like(node, shortest)
        elif not score_product(node) and node.op == "call_function":
            paths[node] = (*shortest, node)


def _stays_in_stream(node: Node, term: Node, sources: Mapping[Node, frozenset[Node]]) -> bool:
    """Whether a node adds a term to a residual stream: the other term comes from elsewhere. Hidden units end there."""
    if base_name(node) not in _SUMS:
        return base_name(node) == "aten.scaled_dot_product_attention.default"
    others = [n for n in node.all_input_nodes if n is not term]
    return any(not sources[n] <= sources[term] for n in others)


def _refusal(like: _Like) -> Refusal:
    down = like.down
    site = site_of([down])
    weight, bend = weight_of(down), like.path[0]
    assert weight is not None
    odd = next((node for node in like.path if not _is_form(node)), None)
    if op(down) in _CONVOLUTIONS:
        return Refusal("ffn", "operator", down, f"{called(down)} ({op(down)}) projects by a convolution, which is not rewritten", site)
    if op(down).partition(".")[0] != "aten":
        return Refusal("ffn", "operator", down, f"{called(down)} ({op(down)}) is a projection that no pass looks into", site)
    if len(shape(weight)) > 2:
        reason = f"{called(down)} ({op(down)}) multiplies with one of {shape(weight)[0]} matrices for each row, as experts and rotations do"
        return Refusal("ffn", "weights", down, reason, site)
    if odd is bend:
        return Refusal("ffn", "between", odd, f"{called(odd)} ({op(odd) or odd.target}) is a nonlinearity that no pass reads", site)
    if odd is not None:
        reason = f"{called(odd)} ({op(odd) or odd.target}) stands between the nonlinearity {called(bend)} and the projection {called(down)}"
        return Refusal("ffn", "between", odd, reason, site)
    reason = f"{called(bend)} enters the input of {called(down)} together with what is computed by no projection of the same input"
    return Refusal("ffn", "operand", down, reason, site)


def _is_form(node: Node) -> bool:
    """Whether an operator may stand between the projections of a region."""
    name = op(node)
    return transparent(node) or name == "aten.dropout.default" or (name in VIEWS and keeps_last_axis(node)) or elementwise(node)
