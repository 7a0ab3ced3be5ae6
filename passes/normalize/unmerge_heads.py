"""Give attention over [batch * heads, length, size] the [batch, heads, length, size] nodes that a region is described by.

`nn.MultiheadAttention` that is asked for weights goes from [n, b, h * d] to [b * h, n, d] in one view, so no node has heads of its own.
Here q, k, v and y get such nodes, as views that are undone at once; what the graph computes stays the same.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.fx import Node

from sptc.passes.find.attention import SOFTMAX, draft_of
from sptc.passes.find.attention_operands import heads_of, split_heads
from sptc.passes.graph.insert import insert, keep_gradient
from sptc.passes.graph.pattern import op, shape
from sptc.passes.mask.mask import Refused
from sptc.passes.mask.reader import Reader


def unmerge_heads(gm: fx.GraphModule) -> None:
    """Insert the views into one graph, in place, where the number of heads can be told."""
    reader = Reader()
    for softmax in [node for node in gm.graph.nodes if op(node) in SOFTMAX and len(shape(node)) == 3]:
        try:
            draft = draft_of(softmax, reader)
        except Refused:
            continue  # find_attention says why
        if draft is None or len(shape(draft.y)) != 3:
            continue
        operands = (draft.q, draft.k, draft.v)
        heads = next((h for operand in operands if (h := heads_of(operand)) is not None), None)
        if heads is None:
            continue
        for operand in operands:
            if split_heads(operand) is None:
                _insert(operand.node, heads)
        _insert(draft.y, heads)


def _insert(node: Node, heads: int) -> None:
    def views(x: Tensor) -> tuple[Tensor, Tensor]:
        four = x.unflatten(0, (-1, heads))
        return four, four.flatten(0, 1)

    users = list(node.users)
    four, three = insert(node.next, views, node, like=node, alike=("heads", heads))
    for view in (four, three):
        keep_gradient(view, node)
    for user in users:
        user.replace_input_with(node, three)
