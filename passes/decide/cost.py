"""What a region costs, dense and sparse: FLOPs, bytes and seconds of forward and backward.

Sizes are numbers or sympy expressions, so one formula serves static and symbolic shapes. A gradient counts only where it is needed: a
frozen weight costs nothing. Seconds are products at the rates that `sptc/device/costs.py` measured, plus memory traffic, exponentials and
fixed overhead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import sympy
import torch

from sptc.device.costs import DeviceCosts
from sptc.ir.region import AttentionSettings, Cost, FfnSettings, UnitSettings
from sptc.ir.sample import LEAST, POOLED_QUERIES, SHARE

Size = Any  # an int or a sympy expression

# Constants of the model. They were counted from the operators, or fitted on a CPU so that the model agreed with the measured times of
# attention and FFNs within a quarter. `python -m bench.attention` and `python -m bench.ffn` measure such times.

# How often each element of an array is read or written between memory and processor: (forward, backward).
_DENSE_ATTENTION_PASSES = (8, 10)  # scores [queries, keys] of attention that is spelled out: matmul, scale, mask, softmax, matmul
_DENSE_HIDDEN_PASSES = (2, 3)  # hidden values [tokens, hidden], for each up projection and once more for the activation's result
_DENSE_LOGITS_PASSES, _LOGITS_PASSES = 8, 7  # logits [rows, classes], forward and backward together: dense, and in chunks
_WIDE = 4  # bytes of a logit: the loss is computed in fp32

_BLOCK_OPS = 4  # small operators around the product of a projection with the rows of one block of a routed FFN
_SMALL_OPS = 20  # small operators that a rewrite adds around its own: routing, casts, reshapes
_LOADING = 48  # rows; bringing a block's weights near takes as long as multiplying this many rows with them
_CAUSAL_MASK = 1.2  # ratio of times of sparse attention, with a causal mask to without one
_CAUSAL_STEP = 512  # keys; fused attention works on so many at a time, so it computes that much above the diagonal
_SOFTMAX = 32  # multiply-adds; what the softmax of one score takes (rates were measured with heads of 64)


@dataclass(frozen=True)
class Work:
    """A cost whose sizes may be symbols."""

    flops: sympy.Expr
    bytes: sympy.Expr
    seconds: sympy.Expr
    kept: sympy.Expr  # bytes, from forward to backward, where what is computed of each element alone is computed again

    def at(self, values: dict[sympy.Symbol, int]) -> Cost:
        """The cost at given sizes."""
        return Cost(*(float(sympy.sympify(e).subs(values)) for e in (self.flops, self.bytes, self.seconds, self.kept)))


@dataclass(frozen=True)
class AttentionShape:
    """An attention region's sizes."""

    b: Size
    h: Size
    h_kv: Size
    n: Size
    m: Size
    d: Size
    d_v: Size
    dtype: torch.dtype | None
    fused: bool  # dense, it is one scaled_dot_product_attention; otherwise scores go through memory
    halved: bool  # dense, the kernel skips what is above the diagonal
    own: bool  # causal
    need: tuple[bool, bool, bool]  # gradients of q, k, v

    @property
    def trains(self) -> bool:
        return any(self.need)


@dataclass(frozen=True)
class FfnShape:
    """An FFN region's sizes."""

    tokens: Size
    d: int
    hidden: int
    d_out: int
    ups: int
    up_ranks: int  # ranks of the adapters of the up projections, summed
    down_rank: int
    dtype: torch.dtype | None
    stand_in_rank: int  # of what stands in for blocks that a token leaves out; 0 without prepared state
    trained_router: bool
    need_x: bool
    need_ups: int  # how many weights of up projections need a gradient
    need_down: bool
    need_adapters: bool
    counted: sympy.Rational = sympy.S.Half  # share of the tokens whose label counts, where these keep other units than the rest

    @property
    def needs_hidden(self) -> bool:
        """Whether a gradient goes through the activation."""
        return self.need_x or self.need_ups > 0 or (self.need_adapters and self.up_ranks > 0)

    @property
    def trains(self) -> bool:
        return self.needs_hidden or self.need_down or self.need_adapters


@dataclass(frozen=True)
class LossShape:
    """A loss region's sizes."""

    rows: Size
    counted: float  # share of the rows whose label counts
    d: int
    classes: int
    rank: int  # of the adapter; 0 without one
    dtype: torch.dtype | None  # of the product
    need_x: bool
    need_weight: bool
    need_adapter: bool
    returned: bool = False  # all logits are computed in any form


def kept_for_backward(dense: Cost, sparse: Cost) -> str:
    """What a region keeps in its sparse form and in its dense one, for people."""
    return f"{sparse.kept / 2**20:.3g} MiB kept for backward instead of {dense.kept / 2**20:.3g}"


def share(density: float) -> Fraction:
    """A density as the fraction that was meant: 0.1 is 1/10."""
    return Fraction(density).limit_denominator(2**16) or Fraction(1, 2**16)


def _element(dtype: torch.dtype | None) -> int:
    return dtype.itemsize if dtype is not None else 4


def _ceil(numerator: Size, denominator: int) -> sympy.Expr:
    return sympy.ceiling(sympy.sympify(numerator) / denominator)


def dense_attention(s: AttentionShape, device: DeviceCosts) -> Work:
    """softmax(q k^T) v; a flash kernel's backward computes the scores again and all three gradients."""
    keys = sympy.Min(s.m, (s.m + _CAUSAL_STEP) / sympy.Integer(2)) if s.halved else s.m
    scores, rates, el = s.b * s.h * s.n * keys, device.rates(s.dtype), _element(s.dtype)
    forward = 2 * scores * (s.d + s.d_v)
    backward = scores * (6 * s.d + 4 * s.d_v if s.fused else 4 * s.d + 4 * s.d_v) * int(s.trains)
    ends = el * _attention_ends(s)
    if s.fused:
        seconds = _with_softmax(s, forward / rates.attention + backward / rates.attention_backward)
        seconds += s.b * s.h * s.n * rates.row_seconds * (1 if s.trains else sympy.Rational(1, 3))
        return Work(forward + backward, ends, seconds + 3 * device.op_seconds, el * _attention_kept(s))
    traffic = ends + el * scores * (_DENSE_ATTENTION_PASSES[0] + _DENSE_ATTENTION_PASSES[1] * int(s.trains))
    seconds = (forward + backward) / rates.gemm + traffic / device.bandwidth + scores / device.exponentials
    return Work(forward + backward, traffic, seconds + 8 * device.op_seconds, el * (_attention_kept(s) + scores * int(s.trains)))


def _with_softmax(s: AttentionShape, seconds: sympy.Expr) -> sympy.Expr:
    """Seconds of products at the rate for heads of 64, with the share of the softmax that this head size has."""
    return seconds * (1 + _SOFTMAX / (s.d + s.d_v)) / (1 + _SOFTMAX / 128)


def _attention_ends(s: AttentionShape) -> sympy.Expr:
    """Elements of q, k, v and out that move: once forward; backward, each again with its gradient."""
    q_and_out = s.b * s.h * s.n * (s.d + s.d_v)
    keys = s.b * s.h_kv * s.m * (s.d + s.d_v)
    return (q_and_out + keys) * (3 if s.trains else 1)


def _attention_kept(s: AttentionShape) -> sympy.Expr:
    """Elements of q, k, v and out that backward reads."""
    return sympy.sympify((s.b * s.h * s.n + s.b * s.h_kv * s.m) * (s.d + s.d_v) * int(s.trains))


def kept_keys(s: AttentionShape, settings: AttentionSettings) -> sympy.Expr:
    """Keys that a tile looks at: its list's width in blocks times the block, at most all."""
    kept = share(settings.density)
    width = _ceil(_ceil(kept.numerator * s.m, kept.denominator), settings.key_block)
    if s.own and settings.query_block > 1:
        width = sympy.Max(width, -(-settings.query_block // settings.key_block))
    return sympy.Min(width, _ceil(s.m, settings.key_block)) * settings.key_block


def sparse_attention(s: AttentionShape, settings: AttentionSettings, device: DeviceCosts) -> Work:
    """Selection, then products of tiles with their gathered blocks; backward gathers and scores again."""
    el, keys = _element(s.dtype), kept_keys(s, settings)
    tiles = _ceil(s.n, settings.query_block)
    mean = keys
    if s.own and s.n == s.m:  # the first tiles have no more keys than there are up to their end
        mean = keys - keys * sympy.Max(0, keys - settings.query_block) / (2 * s.m)
    scores = s.b * s.h * tiles * settings.query_block * mean
    forward = 2 * scores * (s.d + s.d_v)
    need_q, need_k, need_v = s.need
    through_scores = need_q or need_k
    products = 2 * s.d * (1 + need_q + need_k) + 2 * s.d_v * (through_scores + need_v)
    backward = scores * products * int(s.trains)
    chosen, choosing, seconds = _selection(s, settings, device)
    gathered = s.b * s.h_kv * tiles * keys * (s.d + s.d_v) * el
    traffic = el * _attention_ends(s) + gathered * (4 if s.trains else 2) + choosing
    slower = device.sparse_slowdown(s.dtype)
    rates = device.sparse_attention / slower[0], device.sparse_attention_backward / slower[1]
    computing = _with_softmax(s, forward / rates[0] + backward / rates[1])
    seconds += computing * (_CAUSAL_MASK if s.own else 1.0)
    fixed = device.calls(s.b) * device.attention_seconds * (1.0 if s.trains else 0.5) + _SMALL_OPS * device.op_seconds
    return Work(forward + backward + chosen, traffic, seconds + fixed, el * _attention_kept(s))


def _selection(s: AttentionShape, settings: AttentionSettings, device: DeviceCosts) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr]:
    """FLOPs, bytes and seconds of choosing; it has no backward."""
    vectors = s.b * (s.h * s.n + s.h_kv * s.m)
    if settings.selector == "pq":
        codewords = 16 * _ceil(s.d, 8)
        products = vectors * codewords * s.d
        return 2 * products, 4 * vectors * (s.d + codewords), products / device.coded  # in fp32 whatever the dtype
    pairs = s.b * s.h * _ceil(s.n, sympy.Min(settings.query_block, POOLED_QUERIES)) * s.m
    return 2 * pairs * s.d, 4 * (vectors * s.d + pairs), pairs * s.d * device.sparse_slowdown(s.dtype)[2] / device.pooled


def dense_ffn(s: FfnShape, device: DeviceCosts) -> Work:
    """down(act(up_1(x), ...))."""
    flops, el = _ffn_flops(s), _element(s.dtype)
    traffic = el * (_ffn_ends(s) + _hidden_elements(s, _DENSE_HIDDEN_PASSES))
    seconds = flops / device.rates(s.dtype).gemm + _hidden_seconds(s, _DENSE_HIDDEN_PASSES, device)
    return Work(flops, traffic, seconds + (3 + 2 * s.ups) * (2 if s.trains else 1) * device.op_seconds, el * _ffn_kept(s))


def sparse_ffn(s: FfnShape, settings: FfnSettings, device: DeviceCosts) -> Work:
    """The router, then for each block its tokens' products; `active` of `blocks` of everything dense."""
    part, el, gemm = sympy.Rational(settings.active, settings.blocks), _element(s.dtype), device.rates(s.dtype).gemm
    router = 2 * s.tokens * s.d * settings.blocks
    if s.stand_in_rank:  # what training adds to the router, and the stand-in; backward, twice as much again
        added = router + 2 * s.tokens * (s.d + s.d_out) * s.stand_in_rank
        router += added * (3 if s.trained_router and s.trains else 1)
    entries = s.tokens * settings.active
    gathers = el * entries * ((2 * s.d + 3 * s.d_out) + (2 * s.d_out + 3 * s.d) * s.needs_hidden)
    sorting = 16 * 4 * s.tokens * settings.blocks  # passes of a stable sort over the scores
    products = part * _ffn_flops(s)
    traffic = el * (_ffn_ends(s) + part * _hidden_elements(s, _DENSE_HIDDEN_PASSES)) + gathers + sorting
    rows = entries / sympy.Integer(settings.blocks)
    seconds = products / gemm * (1 + _LOADING / rows) + router / gemm + (gathers + sorting) / device.bandwidth
    seconds += part * _hidden_seconds(s, _DENSE_HIDDEN_PASSES, device)
    calls = _BLOCK_OPS * device.calls(settings.blocks) * (1 + s.ups) * (2 if s.trains else 1) + _SMALL_OPS
    return Work(products + router, traffic, seconds + calls * device.op_seconds, el * _ffn_kept(s, part))


def ffn_over_units(s: FfnShape, settings: UnitSettings, device: DeviceCosts) -> Work:
    """The hidden values of a sample of the tokens, weights gathered twice, then a part of the dense FFN's products and passes."""
    el, rates = _element(s.dtype), device.rates(s.dtype)
    context = settings.units if settings.context is None else settings.context
    parts = [sympy.Rational(kept, s.hidden) for kept in (settings.units, context)]
    part = _part(s, settings)
    chosen = [kept for kept in parts if kept < 1]
    sampled = len(set(chosen)) * 2 * sympy.Min(s.tokens, s.tokens / sympy.Integer(SHARE) + LEAST)
    sample = sampled * s.hidden * (s.d * s.ups + (s.d_out if settings.rank else 0))
    thinned = s.counted * int(settings.units < s.hidden) + (1 - s.counted) * int(context < s.hidden)
    sample += thinned * 2 * s.tokens * settings.rank * (s.d + s.d_out) * (2 if s.need_x else 1)
    weights = el * s.hidden * (s.ups * s.d + s.d_out)
    gathered = 2 * weights * (2 if s.trains else 1) * sum(set(chosen)) + 4 * s.hidden * s.d_out * int(bool(chosen))
    rows = el * 2 * s.tokens * (s.d + s.d_out) * (2 if s.trains else 1) * int(settings.context is not None)
    flops = part * _ffn_flops(s)
    traffic = el * (_ffn_ends(s) + part * _hidden_elements(s, _DENSE_HIDDEN_PASSES)) + gathered + rows
    seconds = (flops + sample) / rates.gemm + part * _hidden_seconds(s, _DENSE_HIDDEN_PASSES, device) + (gathered + rows) / device.bandwidth
    seconds += (_SMALL_OPS + (3 + 2 * s.ups) * (2 if s.trains else 1)) * device.op_seconds
    again = part * 2 * s.tokens * s.hidden * (s.ups * s.d + s.up_ranks) * int(settings.recompute and s.needs_hidden)
    kept = _ffn_kept(s, 0 if settings.recompute else part)
    return Work(flops + sample + again, traffic, seconds + again / rates.gemm, el * kept)


def ffn_through_units(s: FfnShape, settings: UnitSettings, device: DeviceCosts) -> Work:
    """The dense forward pass; backward, that of the FFN over fewer units, from hidden values gathered out of the dense ones."""
    forward = replace(s, need_x=False, need_ups=0, need_down=False, need_adapters=False)
    dense, thin, thin_forward = dense_ffn(forward, device), ffn_over_units(s, settings, device), ffn_over_units(forward, settings, device)
    part = _part(s, settings)
    gathered = 2 * _element(s.dtype) * part * s.tokens * s.hidden * s.ups
    return Work(
        dense.flops + thin.flops - thin_forward.flops,
        dense.bytes + thin.bytes - thin_forward.bytes + gathered,
        dense.seconds + thin.seconds - thin_forward.seconds + gathered / device.bandwidth + _SMALL_OPS * device.op_seconds,
        thin.kept,
    )


def _part(s: FfnShape, settings: UnitSettings) -> sympy.Expr:
    """The share of the hidden values that are kept, over all tokens."""
    context = settings.units if settings.context is None else settings.context
    return (s.counted * settings.units + (1 - s.counted) * context) / s.hidden


def _ffn_flops(s: FfnShape) -> sympy.Expr:
    up = 2 * s.tokens * s.d * s.hidden
    down = 2 * s.tokens * s.hidden * s.d_out
    up_adapters, down_adapter = 2 * s.tokens * s.hidden * s.up_ranks, 2 * s.tokens * s.hidden * s.down_rank
    forward = s.ups * up + down + up_adapters + down_adapter
    backward = int(s.needs_hidden) * (down + down_adapter) + int(s.need_x) * s.ups * up + s.need_ups * up + int(s.need_down) * down
    backward += int(s.need_adapters) * (2 * up_adapters + down_adapter)
    return sympy.sympify(forward + backward)


def _ffn_ends(s: FfnShape) -> sympy.Expr:
    """Elements of x, y and the weights, with the gradients that are needed."""
    ends = s.tokens * (s.d + s.d_out)
    weights = s.hidden * (s.ups * s.d + s.d_out)
    gradients = s.hidden * (s.need_ups * s.d + int(s.need_down) * s.d_out)
    return sympy.sympify(ends * (2 if s.trains else 1) + weights * (2 if s.trains else 1) + gradients)


def _ffn_kept(s: FfnShape, part: Size = 1) -> sympy.Expr:
    """Elements of the input and of the share `part` of what the up projections give that backward reads."""
    return sympy.sympify(s.tokens * (s.d * int(s.trains) + part * s.hidden * s.ups * int(s.needs_hidden)))


def _hidden_elements(s: FfnShape, passes: tuple[int, int]) -> sympy.Expr:
    return sympy.sympify(s.tokens * s.hidden * (s.ups + 1) * (passes[0] + passes[1] * s.needs_hidden))


def _hidden_seconds(s: FfnShape, passes: tuple[int, int], device: DeviceCosts) -> sympy.Expr:
    traffic = _hidden_elements(s, passes) * _element(s.dtype)
    return traffic / device.bandwidth + s.tokens * s.hidden * (1 + s.needs_hidden) / device.exponentials


def dense_loss(s: LossShape, device: DeviceCosts) -> Work:
    """All logits, their logarithm of softmax, and back. What it keeps are the logits as the product gives them."""
    flops, traffic = s.rows * _loss_flops(s), s.rows * s.classes * _WIDE * _DENSE_LOGITS_PASSES
    seconds = flops / device.rates(s.dtype).gemm + traffic / device.bandwidth + s.rows * s.classes / device.exponentials
    return Work(flops, traffic, seconds, sympy.sympify(s.rows * (s.classes + s.d) * _element(s.dtype)))


def loss_by_rows(s: LossShape, device: DeviceCosts) -> Work:
    """The rows that count, and every gradient in forward, which is what it keeps."""
    rows, el = s.counted * s.rows, _element(s.dtype)
    flops, traffic = rows * _loss_flops(s), rows * s.classes * _WIDE * _LOGITS_PASSES
    if s.returned:
        flops += (s.rows - rows) * 2 * s.classes * (s.d + s.rank)
    seconds = flops / device.rates(s.dtype).gemm + traffic / device.bandwidth + rows * s.classes / device.exponentials
    kept = el * (s.rows * s.d * int(s.need_x) + s.classes * (s.d * int(s.need_weight) + s.rank * int(s.need_adapter)))
    return Work(flops, traffic, seconds, sympy.sympify(kept))


def _loss_flops(s: LossShape) -> int:
    """Of one row."""
    return 2 * s.classes * (s.d * (1 + s.need_x + s.need_weight) + s.rank * (1 + 2 * s.need_adapter))
