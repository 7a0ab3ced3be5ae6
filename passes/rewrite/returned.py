"""What a graph returns beside its loss, as a rule logits that nothing outside computes with, has no gradient of zeros.

Autograd would fill one for each: of logits an array as large as they are, where a step's memory is at its peak.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sptc.ir.hint import optimization_hint
from sptc.passes.graph.effects import alias_sets, reads, written_by
from sptc.passes.graph.insert import insert
from sptc.passes.graph.pattern import VIEWS, dtype, op, requires_grad, shape, transparent, value
from sptc.passes.graph.row_axes import empty
from sptc.passes.unit import Unit

_LEAST = 1 << 20  # bytes: zeros of fewer cost nothing


def large_results(unit: Unit) -> tuple[int, ...]:
    """Which results of the captured graph are large and carry a gradient, beside a loss that it returns, too.

    Those that share memory with an input or another result are left out: they are views of one tensor to autograd, which a write to one of
    them, outside, has to reach.
    """
    (output,) = unit.gm.graph.find_nodes(op="output")
    results = _results(output)
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
        return visible[sets[result]] == 1 and written.isdisjoint((sets[result], sets[_start(result, output)]))

    return tuple(i for i in large if free(results[i]))


def set_apart(graph: fx.Graph, large: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Let the graph return a handle (`sptc::apart`) for each of these results that a loss is computed from.

    Returns:
        By position: which result belongs to which handle. The handles are behind all other results.
    """
    if not large:
        return ()
    (output,) = graph.find_nodes(op="output")
    losses = [r for r in _results(output) if isinstance(r, Node) and not shape(r)]
    read = set().union(*map(reads, losses))
    handles: dict[int, Node] = {}
    for place in large:
        result = _results(output)[place]
        if not isinstance(result, Node):  # logits that are dropped
            continue
        start = _start(result, output)
        if start.op != "call_function" or read.isdisjoint(start.users):
            continue
        users = list(start.users)
        inside, handles[place] = insert(start.next, torch.ops.sptc.apart, start, like=start)
        for user in users:
            user.replace_input_with(start, inside)
        _return(output, place, insert(output, torch.detach, inside if start is result else result, like=result))
    results = _results(output)
    output.args = (type(output.args[0])([*results, *handles.values()]),)
    return tuple((place, len(results) + i) for i, place in enumerate(handles))


def _start(result: Node, output: Node) -> Node:
    """What else the graph computes with, of which a result is a view, a cast, or what a cache before its first token makes."""
    while len(result.users) == 1 and _results(output).count(result) < 2:
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


def _return(output: Node, place: int, new: Node) -> None:
    results = _results(output)
    results[place] = new
    output.args = (type(output.args[0])(results),)


def _results(output: Node) -> list[Any]:
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
