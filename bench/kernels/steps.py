"""The sparse ops on the operands of a case, one call each: selection, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sptc.codegen.ops  # noqa: F401
from bench.kernels.cases import AttentionCase, AttentionOperands

ops = torch.ops.sptc


def select(case: AttentionCase, o: AttentionOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, counts, and statistics where the selector has codebooks."""
    statistics = o.codebooks is not None
    rest = (case.selector, case.density, case.scale, case.query_block, case.key_block, case.own, statistics)
    return ops.select_blocks(o.q.detach(), o.k.detach(), o.codebooks, *o.mask, *rest)


def attend(case: AttentionCase, o: AttentionOperands, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse."""
    return ops.sparse_attention(o.q, o.k, o.v, ids, counts, *o.mask, *_numbers(case, o), None)


def attend_backward(
    case: AttentionCase, o: AttentionOperands, ids: Tensor, counts: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return ops.sparse_attention_backward(o.grad, o.q, o.k, o.v, out, lse, ids, counts, *o.mask, *_numbers(case, o), [True] * 3)


def _numbers(case: AttentionCase, o: AttentionOperands) -> tuple[Any, ...]:
    return o.seed, case.dropout, case.scale, case.query_block, case.key_block, case.transform


def attention_step(case: AttentionCase, o: AttentionOperands) -> list[Tensor]:
    """Selection, forward and backward, called on this thread (autograd has its own, which sees no context variables). What came out."""
    ids, counts, *statistics = select(case, o)
    out, lse = attend(case, o, ids, counts)
    return [ids, counts, *statistics, out, lse, *attend_backward(case, o, ids, counts, out, lse)]
