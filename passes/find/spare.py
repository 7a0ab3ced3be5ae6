"""Regions that are left as they are: those that the option `exclude` names, and trained heads.

A head is an FFN that reads a residual stream and adds to none: what follows its output, up to the next projection or the loss, is no sum
with another tensor, and its output has not the stream's width. Trained means that its own weights are, not only an adapter's. A
classifier or a value head is learned from nothing in a few steps and costs next to nothing, so there is all to lose and nothing to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch.fx import Node

from sptc.ir.region import FfnRegion, LossRegion, Region
from sptc.passes.find.lookalike import projects
from sptc.passes.graph.pattern import CHECKPOINT, base_name, requires_grad, same_size, shape
from sptc.passes.graph.site import modules_of

_SUMS = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})


def excluding(region: Region | LossRegion, patterns: Iterable[str]) -> str | None:
    """The first of `patterns` that the name of a module of the region matches, or of a module around it."""
    names = modules_of(region.nodes)
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def is_trained_head(region: Region) -> bool:
    """Whether a region is an FFN that trains, reads a residual stream and adds to none."""
    if not isinstance(region, FfnRegion) or same_size(shape(region.x)[-1], shape(region.y)[-1]):
        return False
    if not any(requires_grad(p.weight) for p in (*region.ups, region.down)):
        return False
    return _reaches(region.x, lambda n: n.all_input_nodes, _is_stream) and not _reaches(
        region.y, lambda n: list(n.users), lambda n: _adds(n) and same_size(shape(n)[-1], shape(region.y)[-1])
    )


def _reaches(start: Node, step: Callable[[Node], list[Node]], goal: Callable[[Node], bool]) -> bool:
    """Whether `start`, or what it is computed from or into up to the next projection, is a goal."""
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        if goal(node):
            return True
        if node is not start and projects(node):
            continue
        fresh = [n for n in step(node) if n not in seen]
        seen.update(fresh)
        todo += fresh
    return False


def _is_stream(node: Node) -> bool:
    """A sum of computed tensors, what comes out of a checkpointed layer, or, after a graph break, what another graph computed."""
    return node.target is CHECKPOINT or _adds(node) or _is_computed_before(node)


def _is_computed_before(node: Node) -> bool:
    """Whether a node is an input of the graph that trained weights before it led to."""
    example = getattr(node.meta.get("grapharg"), "example", None) if node.op == "placeholder" else None
    return isinstance(example, torch.Tensor) and example.requires_grad and not example.is_leaf


def _adds(node: Node) -> bool:
    return base_name(node) in _SUMS and len(shape(node)) > 1 and sum(len(shape(n)) > 1 for n in node.all_input_nodes) > 1
