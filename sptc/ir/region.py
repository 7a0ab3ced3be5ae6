"""The nouns that passes hand to each other: projections, masks, regions, refusals, decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

Kind = Literal["attention", "ffn", "loss"]
Rows = Literal["all", "visible", "counted"]
"""Tokens: all, those that are no padding or count in the loss, those that count."""


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter on a projection: y += scaling * B(A(dropout(x)))."""

    low: Node  # [..., r]: the output of A, before B and scaling
    a: Node  # [r, in] weight of A
    b: Node  # [out, r] weight of B
    scaling: float | Node  # a node when dynamic shapes made it symbolic
    dropout_p: float  # of the input of A; 0.0 when absent or not training


@dataclass(frozen=True)
class Projection:
    """y = x W^T + bias (+ LoRA), as linear, addmm or matmul; maybe a range of rows of W (one half of a fused gate-up)."""

    x: Node  # input, unit axis last
    y: Node  # the node that holds the whole sum
    weight: Node
    transposed: bool  # weight is stored [in, out] (Conv1D, matmul) instead of [out, in]
    bias: Node | None
    rows: tuple[int, int] | None  # the output features used; None means all
    lora: Lora | None
    nodes: frozenset[Node]  # every node computed only for this projection, y included, LoRA's A excluded


@dataclass(frozen=True)
class Mask:
    """Which (b, h, q, k) attend: predicate AND boolean AND (bias is not -inf). See sptc/ir/predicate.py for the grammar."""

    predicate: str = "True"
    tensors: tuple[Node, ...] = ()  # t0, t1, ... of the predicate
    sizes: tuple[Node | int, ...] = ()  # s0, s1, ... of the predicate
    boolean: Node | None = None  # bool, broadcastable to [b, h, n, m]
    bias: Node | None = None  # added to the scores, broadcastable to [b, h, n, m], or where `merged` [b * h, 1 or n, m]
    merged: bool = False  # batch and heads are one dimension of the bias
    causal: bool = False  # the predicate implies k <= q + (m - n)
    seeing: bool = True  # every query attends to some key, whatever the operands hold

    @property
    def hides(self) -> bool:
        """Whether some query may not attend to some key."""
        return self.predicate != "True" or self.boolean is not None or self.bias is not None


@dataclass(frozen=True)
class Site:
    """Where in the user's model: module path and source line."""

    module: str  # "model.layers.0.mlp", "" for the root
    source: str  # "modeling_llama.py:174", "" when unknown
    owner: tuple[str, ...] = ()  # keys of nn_module_stack, root first, down to the deepest module common to the region's nodes


@dataclass(frozen=True)
class AttentionRegion:
    """y = softmax(f(scale * q k^T) + mask) v over [batch, heads, length, head size] tensors."""

    q: Node  # [b, h, n, d]
    k: Node  # [b, h_kv, m, d], grouped heads not materialised
    v: Node  # [b, h_kv, m, d_v]
    y: Node  # [b, h, n, d_v]
    scale: float
    dropout_p: float  # 0.0 when not training
    mask: Mask
    nodes: frozenset[Node]
    site: Site
    transform: str = "u0"  # of each scaled score, before the mask: canonical string over u0, which rises with it
    sink: Node | None = None  # [b, h, n, 1]: one more term in the sum of each row's softmax, to which no value belongs
    kind: Literal["attention"] = "attention"


@dataclass(frozen=True)
class FfnRegion:
    """y = down(dropout(act(up_1(x), ..., up_k(x)))): closed, one input and one output."""

    x: Node
    y: Node
    ups: tuple[Projection, ...]
    down: Projection
    activation: str  # its operators, for people: "silu, mul"
    dropout_p: float  # between act and down; 0.0 when not training
    hidden: int  # d_ff
    nodes: frozenset[Node]
    site: Site
    kind: Literal["ffn"] = "ffn"


Region = AttentionRegion | FfnRegion
"""What has a sparse form. A `LossRegion` has another one, which is exact."""


@dataclass(frozen=True)
class Reshape:
    """Undoes a view of the rows: sizes are numbers, or a dimension of an input or of what is computed from inputs; None: what is left."""

    sizes: tuple[int | tuple[Node, int] | None, ...]


@dataclass(frozen=True)
class Pad:
    """Undoes a slice of the rows: what was cut off does not count."""

    dim: int
    before: int
    after: int


@dataclass(frozen=True)
class Permute:
    """Undoes a transposition."""

    order: tuple[int, ...]


Step = Reshape | Pad | Permute


@dataclass(frozen=True)
class LossRegion:
    """y = cross entropy of f(x W^T + bias), a number: closed but for logits that the graph returns, or reads without gradient."""

    y: Node
    projection: Projection  # of x [..., d] to the logits
    bias: Node | None  # [..., classes], of as many elements as classes
    transform: str  # f, canonical string over u0; "u0" for nothing
    logits: Node  # x W^T + bias, as computed, before casts
    mapped: tuple[Node, ...]  # what computes f, the last node first
    labels: Node  # as the loss reads them
    undo: tuple[Step, ...]  # from the labels to those of the rows of x
    ignored: int
    mean: bool  # over labels that count; else their sum
    smoothing: float
    returned: tuple[Node, ...]  # logits, maybe cast, cut or viewed, that the graph returns
    readers: tuple[Node, ...]  # what else reads them in the graph, without gradient
    classes: int
    product: torch.dtype  # of the logits as the projection gives them
    nodes: frozenset[Node]
    site: Site
    kind: Literal["loss"] = "loss"


@dataclass(frozen=True)
class Refusal:
    """A place that looked like a region and is not usable: the rule, the node, why, and where."""

    kind: Kind | Literal["graph"]  # "graph": a part of the graph that no finder looks into
    rule: str  # short and stable, for example "escapes"
    node: Node
    reason: str  # for people
    site: Site


@dataclass(frozen=True)
class Found:
    """What the finders return for one graph (a body of a checkpoint is a graph of its own)."""

    regions: tuple[Region, ...]
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class RouterState:
    """A prepared FFN's trainable state (`sptc.paper.state.Router`), as nodes of the region's graph."""

    weight: Node  # [G, d]
    bias: Node  # [G]
    start_weight: Node  # [G, d]
    start_bias: Node  # [G]
    low: Node  # [r, d]
    high: Node  # [d_out, r]
    constant: Node  # [d_out]
    training: bool
    trainable: bool = True  # the router's parameters require a gradient


@dataclass(frozen=True)
class CodebookState:
    """A prepared attention's state, as nodes of the region's graph."""

    codebooks: Node  # fp32 [h_kv, M, E, d / M]
    code_sums: Node  # fp32 like codebooks: sum of the vectors of each codeword since the last update
    code_counts: Node  # fp32 [h_kv, M, E]
    training: bool


State = RouterState | CodebookState


@dataclass(frozen=True)
class AttentionSettings:
    """How a region's attention becomes sparse."""

    density: float
    query_block: int
    key_block: int
    selector: Literal["pq", "pooled"]


@dataclass(frozen=True)
class FfnSettings:
    """How a region's FFN becomes routed: `active` of `blocks` blocks of hidden units for each token, on average if `keep`."""

    blocks: int
    active: int
    keep: bool = False  # tokens that count in the loss get more blocks than others

    @property
    def density(self) -> float:
        return self.active / self.blocks

    @property
    def left_out(self) -> float:
        """The share of its blocks that a token leaves out, on average if `keep`."""
        return (self.blocks - self.active) / self.blocks


@dataclass(frozen=True)
class UnitSettings:
    """How many hidden units an FFN keeps, one set for many tokens: `units` of `hidden`, fewer for tokens that do not count."""

    hidden: int
    units: int  # of the tokens that count, or of all where `context` is None
    context: int | None = None  # of the other tokens; None: all tokens are alike
    gradients_only: bool = False  # the forward pass keeps all units, whatever gradients go through
    rows: Rows = "all"  # the tokens that it is computed for: nothing reads the output of others
    recompute: bool = False  # backward computes hidden values again from the input, and none is kept
    chunk: int | None = None  # with `recompute`: so many tokens at a time, forward and backward; None: all at once
    rank: int = 0  # of the linear map of x that stands in for units that are left out; 0: nothing does

    @property
    def density(self) -> float:
        """The share that a plan chooses: that of the context, where it has one."""
        if self.gradients_only:
            return 1.0
        return (self.units if self.context is None else self.context) / self.hidden

    @property
    def all_units(self) -> bool:
        """Whether no unit is left out."""
        return self.units == self.hidden and self.context in (None, self.hidden)

    @property
    def whole(self) -> bool:
        """Whether nothing is left out, and nothing kept less."""
        return self.all_units and self.rows == "all" and not self.recompute


Settings = AttentionSettings | FfnSettings | UnitSettings


@dataclass(frozen=True)
class LossSettings:
    """How a loss is computed: for the rows that count, some at a time."""

    rows: int  # at a time, at most
    given: bool = False  # all logits are computed besides, and it takes those that count of them; else it computes these itself
    kept: int | None = None  # the graph's result that are its logits, if a gradient may come for it
    returned: str = ""  # what that result is, a function of the logits as the region's `transform`; "" without one
    deferred: bool = False  # that result is computed when something outside uses it
    density: float = 1.0  # exact whatever the settings


@dataclass(frozen=True)
class Deferral:
    """How logits that a graph returned are computed once something uses them."""

    gm: GraphModule  # of the input of their projection, then of some inputs of the graph
    inputs: tuple[int, ...]  # which these are


@dataclass(frozen=True)
class Counted:
    """How the mask of the tokens that count is computed."""

    logits: Node  # what the loss is computed from: classes are dimension 1
    target: Node
    ignored: int
    chain: tuple[Node, ...]  # what computes the target from inputs, in order
    undo: tuple[Step, ...]  # from the rows of the loss to those of the tokens
    lead: tuple[Any, ...]  # sizes of the mask then
    rows_of: Node  # what has these rows, in this order, and
    axis: int  # one dimension more: that of the classes, or of what they are computed from


@dataclass(frozen=True)
class Cost:
    """Forward and backward of a region: floating-point operations, bytes moved, and predicted seconds on this device."""

    flops: float
    bytes: float
    seconds: float
    kept: float  # bytes that forward keeps for backward


@dataclass(frozen=True)
class Decision:
    """Whether a region is rewritten, how, and why."""

    region: Region | LossRegion
    rewrite: bool
    reason: str
    settings: Settings | LossSettings
    dense: Cost
    sparse: Cost
