"""What one call of a sparse op launches, told from its arguments' shapes: for emitting kernels before they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sptc.codegen.kernels import attention as attention_kernels
from sptc.codegen.kernels import ffn as ffn_kernels
from sptc.codegen.launch import Launch, recorded
from sptc.codegen.ops.attention import attention_on_kernels, select_on_kernels
from sptc.codegen.ops.ffn import forward_on_kernels


def launches_of(op: Any, arguments: Sequence[Any]) -> list[Launch]:
    """The launches of a call, and of its backward if one of its arguments requires a gradient. Empty for an op without kernels.

    Args:
        op: an OpOverload, such as torch.ops.sptc.sparse_attention.default.
        arguments: as its schema has them, tensors on "meta".
    """
    ops = torch.ops.sptc
    with torch.no_grad(), recorded() as found:
        if op is ops.select_blocks.default:
            select_on_kernels(*arguments)
        elif op is ops.sparse_attention.default:
            _attention(arguments)
        elif op is ops.routed_ffn.default:
            _ffn(arguments)
        elif op is ops.sparse_attention_backward.default:
            attention_kernels.backward(*arguments)
        elif op is ops.routed_ffn_backward.default:
            ffn_kernels.routed_ffn_backward(*arguments)
    return found


def _attention(arguments: Sequence[Any]) -> None:
    q, k, v, *rest = arguments
    out, lse = attention_on_kernels(q, k, v, *rest)
    need = [x.requires_grad for x in (q, k, v)]
    backward: Any = attention_kernels.backward  # what `rest` holds is the schema's to say
    if any(need):
        backward(torch.empty_like(out), q, k, v, out, lse, *rest, need)


def _ffn(arguments: Sequence[Any]) -> None:
    x, up, up_bias, _, low, up_B, _, down, down_A, _, _, scale, *_ = arguments
    y, low_out, pre = forward_on_kernels(*arguments)
    sources: list[Tensor | None] = [x, *up, *up_bias, *low, *up_B, down, down_A, scale]
    need = [source is not None and source.requires_grad for source in sources]
    backward: Any = ffn_kernels.routed_ffn_backward
    if any(need):
        backward(torch.empty_like(y), None if down_A is None else torch.empty_like(low_out), *arguments, pre, need)
