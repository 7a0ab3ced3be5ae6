"""Graphs inside graphs: the bodies of activation checkpoints, and how values pass between them and the graph around."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx
from torch.fx import Node

from sptc.passes.graph.pattern import CHECKPOINT


def checkpoint_bodies(gm: fx.GraphModule) -> list[tuple[Node, fx.GraphModule]]:
    """The (call, body) pairs of activation checkpoints directly in `gm`."""
    return [
        (node, getattr(gm, str(node.args[0].target)))
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target is CHECKPOINT and isinstance(node.args[0], Node)
    ]


def graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """`gm` and the bodies of its activation checkpoints, nested ones included, outermost first."""
    return [gm, *(inner for _, body in checkpoint_bodies(gm) for inner in graphs(body))]


@dataclass(frozen=True)
class Frame:
    """A graph, and the call that runs it in the graph around it (None: the outermost)."""

    gm: fx.GraphModule
    call: Node | None = None
    parent: Frame | None = None

    def path(self) -> list[Frame]:
        """This frame and those around it, outermost first."""
        return [*(self.parent.path() if self.parent else []), self]


def frames(gm: fx.GraphModule, call: Node | None = None, parent: Frame | None = None) -> Iterator[Frame]:
    """The frames of `gm` and of the checkpoint bodies in it, outermost first."""
    frame = Frame(gm, call, parent)
    yield frame
    for inner_call, body in checkpoint_bodies(gm):
        yield from frames(body, inner_call, frame)


def operands(frame: Frame) -> dict[Node, Node]:
    """What each placeholder of a checkpoint body is in the graph around it; {} for the outermost graph."""
    if frame.call is None:
        return {}
    pairs = zip(_placeholders(frame), frame.call.args[1:], strict=True)
    return {inner: node for inner, node in pairs if isinstance(node, Node)}


def drop_unused_operands(frame: Frame) -> None:
    """Remove the placeholders of a checkpoint body that nothing in it uses, and what its call passes for them."""
    if frame.call is None:
        return
    body, *passed = frame.call.args
    pairs = list(zip(_placeholders(frame), passed, strict=True))
    frame.call.args = (body, *(arg for inner, arg in pairs if inner.users))
    for inner, _ in pairs:
        if not inner.users:
            frame.gm.graph.erase_node(inner)


def parameter(node: Node) -> Node:
    """What `node` is before views and casts, such as the parameter behind a transposed weight."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def outermost(node: Node, frame: Frame) -> Node:
    """What a placeholder of a checkpoint body stands for in the outermost graph; other nodes stand for themselves."""
    while frame.parent is not None and frame.call is not None and node.op == "placeholder":
        node = frame.call.args[1 + _placeholders(frame).index(node)]  # type: ignore[assignment]
        frame = frame.parent
    return node


def hand_down(node: Node, start: Frame, end: Frame) -> Node:
    """`node` of `start` as seen in `end`, a checkpoint body in it: the calls between pass it on as an operand, a new one where needed."""
    path = end.path()
    for frame in path[path.index(start) + 1 :]:
        assert frame.call is not None
        placeholders, operands = _placeholders(frame), list(frame.call.args[1:])
        if node in operands:
            node = placeholders[operands.index(node)]
            continue
        with frame.gm.graph.inserting_after(placeholders[-1]):
            inner = frame.gm.graph.placeholder(node.name)
        inner.meta.update({key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta})
        frame.call.args = (*frame.call.args, node)
        node = inner
    return node


def input_index(node: Node) -> int | None:
    """Which input of its graph `node` is; None when it is computed."""
    return node.graph.find_nodes(op="placeholder").index(node) if node.op == "placeholder" else None


def _placeholders(frame: Frame) -> list[Node]:
    return frame.gm.graph.find_nodes(op="placeholder")
