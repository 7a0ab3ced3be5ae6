"""The sparse ops on the operands of a case, one call each: selection or routing, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sptc.codegen.ops  # noqa: F401
from bench.kernels.cases import AttentionCase, AttentionOperands, FfnCase, FfnOperands

ops = torch.ops.sptc


def select(case: AttentionCase, o: AttentionOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, counts, and statistics where the selector has codebooks."""
    statistics = o.codebooks is not None
    rest = (case.selector, case.density, case.scale, case.query_block, case.key_block, case.own, statistics)
    return ops.select_blocks(o.q.detach(), o.k.detach(), o.codebooks, *o.mask, *rest)


def attend(case: AttentionCase, o: AttentionOperands, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse."""
    return ops.sparse_attention(o.q, o.k, o.v, ids, counts, *o.mask, *_numbers(case, o))


def attend_backward(
    case: AttentionCase, o: AttentionOperands, ids: Tensor, counts: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return ops.sparse_attention_backward(o.grad, o.q, o.k, o.v, out, lse, ids, counts, *o.mask, *_numbers(case, o), [True] * 3)


def _numbers(case: AttentionCase, o: AttentionOperands) -> tuple[Any, ...]:
    return o.seed, case.dropout, case.scale, case.query_block, case.key_block


def ffn_arguments(case: FfnCase, o: FfnOperands, tokens: Tensor, offsets: Tensor, scale: Tensor | None) -> tuple[Any, ...]:
    """The arguments of `sptc::routed_ffn` for given lists."""
    biased, adapted = list(range(len(o.up_bias))), list(range(len(o.low)))
    operands = (o.x, o.up, o.up_bias, biased, o.low, o.up_B, adapted, o.down, o.down_A)
    return *operands, tokens, offsets, scale, o.seed, None, case.dropout, 0.0, case.text


def ffn_need(case: FfnCase, o: FfnOperands) -> list[bool]:
    """Which gradients training needs, in the order of `sptc::routed_ffn_backward`: frozen weights need none."""
    trains, adapts = case.weights_train, case.lora > 0
    weights = [trains] * (len(o.up) + len(o.up_bias)) + [adapts] * (len(o.low) + len(o.up_B))
    return [True, *weights, trains, adapts, case.scaled]


def route(case: FfnCase, o: FfnOperands) -> tuple[Tensor, Tensor, Tensor | None]:
    """tokens, offsets and the scale of each list entry."""
    tokens, offsets, index = ops.route(o.scores, case.active)
    return tokens, offsets, 2 * o.scores.reshape(-1).index_select(0, index) if case.scaled else None


def ffn_step(case: FfnCase, o: FfnOperands) -> list[Tensor]:
    """Route, forward and backward, called on this thread (autograd has its own, which sees no context variables). What came out."""
    arguments = ffn_arguments(case, o, *route(case, o))
    y, low_out, pre = ops.routed_ffn(*arguments)
    return [y, low_out, *ops.routed_ffn_backward(o.grad_y, o.grad_low_out, *arguments, pre, ffn_need(case, o))]


def attention_step(case: AttentionCase, o: AttentionOperands) -> list[Tensor]:
    """Selection, forward and backward, called on this thread. What came out."""
    ids, counts, *statistics = select(case, o)
    out, lse = attend(case, o, ids, counts)
    return [ids, counts, *statistics, out, lse, *attend_backward(case, o, ids, counts, out, lse)]
