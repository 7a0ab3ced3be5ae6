"""What one call of a sparse op launches, told from its arguments' shapes: for emitting kernels before they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sptc.codegen.ops.attention import attention_on_kernels, select_on_kernels
from sptc.codegen.triton.launchers import attention as attention_kernels
from sptc.codegen.triton.run.launch import Launch, recorded


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
        elif op is ops.sparse_attention_backward.default:
            attention_kernels.backward(*arguments)
    return found


def _attention(arguments: Sequence[Any]) -> None:
    q, k, v, *rest = arguments
    out, lse = attention_on_kernels(q, k, v, *rest)
    need = [x.requires_grad for x in (q, k, v)]
    if any(need):
        attention_kernels.backward(torch.empty_like(out), q, k, v, out, lse, *rest[:-1], need)  # without the sink
