"""What a graph returns beside its loss that is large, and of what it is another view."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sptc.ir.hint import optimization_hint
from sptc.ir.region import LossRegion
from sptc.passes.graph.effects import alias_sets, has_effects, written_by
from sptc.passes.graph.pattern import VIEWS, dtype, op, requires_grad, shape, transparent, under_views, value
from sptc.passes.graph.row_axes import empty
from sptc.passes.unit import Unit

_LEAST = 1 << 20  # bytes: zeros of fewer cost nothing


def large_results(unit: Unit) -> tuple[int, ...]:
    """Which results of the captured graph are large and carry a gradient, beside a loss that it returns, too.

    Those that share memory with an input or another result are left out: they are views of one tensor to autograd, which a write to one of
    them, outside, has to reach.
    """
    (output,) = unit.gm.graph.find_nodes(op="output")
    results = results_of(output)
    cuda_graphs = (unit.config.inductor or {}).get("triton.cudagraphs", inductor_config.triton.cudagraphs)
    large = [i for i, r in enumerate(results) if shape(r) and _carries_gradient(r) and _bytes(r) >= _LEAST]
    if not large or cuda_graphs or not any(_is_loss(r) for r in results):
        return ()
    nodes = unit.gm.graph.nodes
    sets = alias_sets(unit.gm.graph)
    outer = [node for node in nodes if node.op in ("placeholder", "get_attr")]
    visible = Counter(sets[node] for node in (*outer, *{r for r in results if isinstance(r, Node)}))
    written = {sets[target] for node in nodes for target in written_by(node)}

    def free(result: Node) -> bool:
        return visible[sets[result]] == 1 and written.isdisjoint((sets[result], sets[start_of(result, output)]))

    return tuple(i for i in large if free(results[i]))


def logits_given(unit: Unit, region: LossRegion, keep: bool) -> tuple[int | None, str] | None:
    """How a loss can take the logits that are computed besides.

    Which result of the captured graph they are, under any shape and dtype, and the function of them that it is; no result where no gradient
    can come for one. None: the graph returns more of them or less, or they can't leave it without gradient (`large_results`).

    `keep`: the graph goes on returning them.
    """
    (output,) = unit.gm.graph.find_nodes(op="output")
    returned = [node for node in region.returned if _carries_gradient(node)] if keep else []
    if not _as_projected(region):
        return None
    if not returned:
        return None, ""
    places = [place for place in large_results(unit) if results_of(output)[place] in returned]
    if len(places) != 1 or len(returned) != 1:
        return None
    node, mapped = under_views(results_of(output)[places[0]]), []
    while node in region.mapped:
        mapped.append(node)
        node = under_views(node.all_input_nodes[0])
    if node is not region.logits or tuple(mapped) not in ((), region.mapped):
        return None
    return places[0], region.transform if mapped else "u0"


def source_of(unit: Unit, region: LossRegion, place: int) -> tuple[Node, ...] | None:
    """What the logits that the graph returns at `place` are computed by, when that is done once they are used.

    The nodes behind the input of the projection, in the order of the graph, inputs of the graph among them. None where logits would not be
    the same then: what is drawn at random, weights that are trained, and whatever is written to or shares memory with what others see.
    """
    x, graph = region.projection.x, unit.gm.graph
    (output,) = graph.find_nodes(op="output")
    seen: set[Node] = set()
    waiting = [results_of(output)[place]]
    while waiting:
        node = waiting.pop()
        if node is x or node in seen:
            continue
        if node.op == "placeholder":
            known = value(node)
            if isinstance(known, Tensor) and (requires_grad(node) or is_traceable_wrapper_subclass(known)):
                return None
        elif node.op != "call_function" or has_effects(node) or "device" in node.kwargs:
            return None
        seen.add(node)
        waiting += node.all_input_nodes
    sets = alias_sets(graph)
    visible = [n for n in (*graph.find_nodes(op="placeholder"), *results_of(output)) if isinstance(n, Node)]
    written = {sets[target] for node in graph.nodes for target in written_by(node)}
    if any(sets[node] is sets[x] for node in visible) or any(sets[node] in written for node in (x, *seen)):
        return None
    return tuple(node for node in graph.nodes if node in seen)


def ends_at_a_break(gm: GraphModule) -> bool:
    """Whether a graph ends where Dynamo broke it, and not where the function returns."""
    why: Any = getattr(gm, "compile_subgraph_reason", None)
    return why is not None and bool(why.graph_break)


def _as_projected(region: LossRegion) -> bool:
    """Whether the rows of the logits are those of their projection: a bias may be added after some were cut off."""
    return under_views(region.projection.y) in (region.logits, *map(under_views, region.logits.all_input_nodes))


def start_of(result: Node, output: Node) -> Node:
    """What else the graph computes with, of which a result is a view, a cast, or what a cache before its first token makes."""
    while len(result.users) == 1 and results_of(output).count(result) < 2:
        if op(result) in VIEWS or transparent(result):
            before: Node = result.args[0]  # type: ignore[assignment]
        elif op(result) == "aten.cat.default":
            filled = [part for part in result.args[0] if not empty(part)]  # type: ignore[union-attr, arg-type]
            if len(filled) != 1:
                break
            before = filled[0]  # type: ignore[assignment]
        else:
            break
        if value(before).device != value(result).device:
            break
        result = before
    return result


def results_of(output: Node) -> list[Any]:
    return [*output.args[0]]  # type: ignore[misc]


def _is_loss(result: Any) -> bool:
    return isinstance(result, Node) and not shape(result) and _carries_gradient(result)


def _carries_gradient(result: Any) -> bool:
    known = value(result)
    return (
        isinstance(result, Node)
        and isinstance(known, Tensor)
        and known.is_floating_point()
        and not is_traceable_wrapper_subclass(known)
        and requires_grad(result)
    )


def _bytes(result: Node) -> int:
    to = dtype(result)
    assert to is not None
    return to.itemsize * math.prod(optimization_hint(size) for size in shape(result))
