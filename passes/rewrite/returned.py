"""What a graph returns beside its loss, as a rule logits that nothing outside computes with, has no gradient of zeros.

Autograd would fill one for each: of logits an array as large as they are, where a step's memory is at its peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.fx import Node

from sptc.passes.find.returned import results_of, start_of
from sptc.passes.graph.effects import reads
from sptc.passes.graph.insert import insert
from sptc.passes.graph.pattern import shape


def set_apart(graph: fx.Graph, large: Sequence[int], kept: Mapping[int, Node]) -> tuple[tuple[int, int], ...]:
    """Let the graph return a handle (`sptc::apart`) for each of these results that a loss is computed from.

    Args:
        graph: the rewritten graph.
        large: results that no loss took the place of, by position.
        kept: handles of logits that a rewritten loss leaves, by the position of the logits.

    Returns:
        By position: which result belongs to which handle. The handles are behind all other results.
    """
    if not large and not kept:
        return ()
    (output,) = graph.find_nodes(op="output")
    losses = [r for r in results_of(output) if isinstance(r, Node) and not shape(r)]
    read = set().union(*map(reads, losses))
    handles = dict(kept)
    for place in large:
        result = results_of(output)[place]
        if place in kept:
            return_instead(output, place, insert(output, torch.detach, result, like=result))
            continue
        if not isinstance(result, Node):  # logits that are dropped
            continue
        start = start_of(result, output)
        if start.op != "call_function" or read.isdisjoint(start.users):
            continue
        users = list(start.users)
        inside, handles[place] = insert(start.next, torch.ops.sptc.apart, start, like=start)
        for user in users:
            user.replace_input_with(start, inside)
        return_instead(output, place, insert(output, torch.detach, inside if start is result else result, like=result))
    results = results_of(output)
    output.args = (type(output.args[0])([*results, *handles.values()]),)
    return tuple((place, len(results) + i) for i, place in enumerate(handles))


def return_instead(output: Node, place: int, new: Node) -> None:
    """Let a graph return another node at `place`."""
    results = results_of(output)
    results[place] = new
    output.args = (type(output.args[0])(results),)
