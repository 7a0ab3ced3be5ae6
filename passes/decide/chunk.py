"""For how many of its tokens at a time an FFN computes its hidden values, where backward computes them again."""

from __future__ import annotations

import torch
from torch.fx import Node

from sptc.ir.region import FfnRegion
from sptc.passes.decide.sizes import length_of
from sptc.passes.graph.effects import after_writes
from sptc.passes.graph.elementwise import elementwise
from sptc.passes.graph.pattern import value
from sptc.passes.unit import Unit

_VALUES, _STEP = 1 << 20, 64  # hidden values of a chunk: few enough for a processor's cache
_LEAST = {"cpu": 256, "cuda": 2048}  # tokens, enough for fast products


def chunk_of(unit: Unit, region: FfnRegion) -> int | None:
    """How many tokens at a time; None: all at once."""
    given = unit.config.ffn_chunk
    if given == 0 or (given is None and unit.config.objective != "memory") or not _divides(region):
        return None
    least = _LEAST.get(value(region.y).device.type, _LEAST["cuda"])
    chunk = given or max(least, _VALUES // region.hidden // _STEP * _STEP)
    return chunk if given or length_of(region).hint > chunk else None


def _divides(region: FfnRegion) -> bool:
    """Not where it draws random numbers, which backward could not draw again, nor where its activation reads a number that is a size, nor
    where an operand follows from an input that the graph changes in place, which backward would read as it is then, nor where an operand
    would have to be multiplied with one number of the graph for one projection and with another for the next."""
    if not after_writes(region.y.graph).isdisjoint({n for node in region.nodes for n in node.all_input_nodes}):
        return False
    if region.dropout_p or (region.down.lora is not None and region.down.lora.dropout_p):
        return False
    if _scaled_twice(region):
        return False
    pending, seen = [region.down.x], {up.y for up in region.ups}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if elementwise(node) and any(isinstance(value(n), torch.SymInt | torch.SymFloat) for n in node.all_input_nodes):
            return False
        pending += [n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor)]
    return True


def _scaled_twice(region: FfnRegion) -> bool:
    """Whether an operand that takes an adapter's scaling, a number of the graph, is read by another projection without it.

    No program can hold such a number: what B is given is multiplied with it before, of the down projection B itself
    (`passes/rewrite/chunks.py`).
    """
    reads: dict[Node, set[float | Node]] = {}
    for projection in (*region.ups, region.down):
        lora, down = projection.lora, projection is region.down
        plain = [projection.weight, projection.bias]
        if lora is not None:
            reads.setdefault(lora.b if down else lora.low, set()).add(lora.scaling)
            plain += [lora.a if down else lora.b]
        for node in plain:
            if node is not None:
                reads.setdefault(node, set()).add(1.0)
    reads.setdefault(region.x, set()).add(1.0)
    return any(len(numbers) > 1 and any(isinstance(number, Node) for number in numbers) for numbers in reads.values())
