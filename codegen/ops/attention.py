"""Schemas, fakes, autograd and autocast rules of the sparse attention ops. `docs/design/operators.md` is their contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sptc.codegen.cpu import attention as cpu
from sptc.codegen.cpu import selection as cpu_selection
from sptc.codegen.cpu.mask import CpuMask
from sptc.codegen.ops import autocast
from sptc.codegen.ops.implementation import implement
from sptc.codegen.reference.block_lists import block_count, list_width
from sptc.codegen.reference.layout import empty_rows
from sptc.codegen.triton.launchers import attention as kernels
from sptc.codegen.triton.launchers import selection as kernel_selection
from sptc.codegen.triton.launchers.mask import KernelMask
from sptc.ir.predicate import parse

_MASK = "str predicate, Tensor[] mask_tensors, SymInt[] mask_sizes, Tensor? mask, Tensor? bias"
_COMPUTE = f"{_MASK}, Tensor? seed, float dropout_p, float scale, int query_block, int key_block, str transform"

_lib = torch.library.Library("sptc", "FRAGMENT")
_lib.define(
    f"select_blocks(Tensor q, Tensor k, Tensor? codebooks, {_MASK}, str selector, float density, float scale, "
    "int query_block, int key_block, bool own, bool statistics) -> (Tensor ids, Tensor counts, Tensor code_sums, Tensor code_counts)"
)
_lib.define(
    f"sparse_attention(Tensor q, Tensor k, Tensor v, Tensor ids, Tensor counts, {_COMPUTE}, Tensor? sink) -> (Tensor out, Tensor lse)"
)
_lib.define(
    "sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor ids, Tensor counts, "
    f"{_COMPUTE}, bool[] need) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)


def _check_heads(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q must be [b, h, n, d] and k [b, h_kv, m, d] with h a multiple of h_kv, got {list(q.shape)} and {list(k.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}; pass an additive mask as bias")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}; pass a boolean mask as mask")
    scores = (*q.shape[:3], k.shape[2])
    for name, operand in (("mask", mask), ("bias", bias)):
        if operand is not None and (
            operand.dim() > 4 or any(size not in (1, wanted) for size, wanted in zip(operand.shape[::-1], scores[::-1], strict=False))
        ):
            raise ValueError(f"{name} must be broadcastable to {list(scores)}, got {list(operand.shape)}")


def _check_lists(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, dropout_p: float, seed: Tensor | None, query_block: int
) -> None:
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [b, h_kv, m, d_v] with the k of {list(k.shape)}, got {list(v.shape)}")
    lists = (*k.shape[:2], block_count(q.shape[2], query_block))
    if ids.dtype != torch.int32 or counts.dtype != torch.int32 or ids.shape[:3] != lists or counts.shape != lists:
        raise ValueError(
            f"ids and counts must be int32 of {[*lists, 'width']} and {[*lists]}, got {ids.dtype} {list(ids.shape)}, "
            f"{counts.dtype} {list(counts.shape)}; they are those of this query_block"
        )
    if not 0.0 <= dropout_p <= 1.0 or (dropout_p > 0.0 and seed is None):
        raise ValueError(f"dropout needs a probability in [0, 1] and a seed, got {dropout_p} and {seed}")


def _check_sink(q: Tensor, sink: Tensor | None) -> None:
    if sink is not None and (sink.dim() != 4 or sink.shape[:3] != q.shape[:3] or sink.shape[3] != 1 or not sink.is_floating_point()):
        raise ValueError(f"sink must be floating point of {[*q.shape[:3], 1]}, got {sink.dtype} {list(sink.shape)}")


def _check_selection(q: Tensor, k: Tensor, codebooks: Tensor | None, *operands: Any) -> None:
    _, _, _, mask, bias, selector, *_, statistics = operands
    _check_heads(q, k, mask, bias)
    if selector not in ("pq", "pooled"):
        raise ValueError(f"selector must be 'pq' or 'pooled', got {selector!r}")
    if selector == "pooled":
        if statistics:
            raise ValueError("selector 'pooled' has no codebooks, so there are no statistics of them; pass statistics=False")
        return
    if codebooks is None:
        raise ValueError("selector 'pq' needs codebooks [h_kv, M, E, d / M]")
    if codebooks.dim() != 4 or codebooks.shape[0] != k.shape[1] or codebooks.shape[1] * codebooks.shape[3] != q.shape[3]:
        raise ValueError(f"codebooks must be [h_kv, M, E, d / M] for k {list(k.shape)}, got {list(codebooks.shape)}")


def _cpu_mask(q: Tensor, k: Tensor, operands: Sequence[Any], query_block: int, key_block: int) -> CpuMask:
    """From the five operands that `_MASK` names."""
    (b, h, n, _), (h_kv, m) = q.shape, k.shape[1:3]
    predicate, tensors, sizes, mask, bias = operands
    return CpuMask(parse(predicate), tensors, sizes, mask, bias, b, h, h_kv, n, m, query_block, key_block)


def _select_cpu(q: Tensor, k: Tensor, codebooks: Tensor | None, *operands: Any) -> tuple[Tensor, ...]:
    *mask, selector, density, scale, query_block, key_block, own, statistics = operands
    _check_selection(q, k, codebooks, *operands)
    blocks = _cpu_mask(q, k, mask, query_block, key_block)
    return cpu_selection.select_blocks(q, k, codebooks, blocks, selector, density, scale, own, statistics)


def select_on_kernels(q: Tensor, k: Tensor, codebooks: Tensor | None, *operands: Any) -> tuple[Tensor, ...]:
    """`sptc::select_blocks` by launches of emitted kernels."""
    _check_selection(q, k, codebooks, *operands)
    predicate, tensors, sizes, mask, bias, *how = operands
    whole = KernelMask(predicate, tensors, sizes, mask, bias, (*q.shape[:3], k.shape[2]))
    return kernel_selection.select_blocks(q, k, codebooks, whole, *how)


def _select_fake(q: Tensor, k: Tensor, codebooks: Tensor | None, *operands: Any) -> tuple[Tensor, ...]:
    predicate, tensors, sizes, _, _, _, density, _, query_block, key_block, own, statistics = operands
    _check_selection(q, k, codebooks, *operands)
    parse(predicate).check(tensors, sizes)
    (b, _, n, _), (h_kv, m) = q.shape, k.shape[1:3]
    lists = (b, h_kv, block_count(n, query_block))
    ids = q.new_empty((*lists, list_width(n, m, density, query_block, key_block, own)), dtype=torch.int32)
    shapes = ((0,), (0,)) if codebooks is None or not statistics else (codebooks.shape, codebooks.shape[:3])
    return ids, q.new_empty(lists, dtype=torch.int32), *(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _call(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, *operands: Any) -> cpu.Call:
    predicate, tensors, sizes, mask, bias, seed, dropout_p, scale, query_block, key_block, transform = operands
    _check_heads(q, k, mask, bias)
    _check_lists(q, k, v, ids, counts, dropout_p, seed, query_block)
    parse(predicate).check(tensors, sizes)
    blocks = _cpu_mask(q, k, operands[:5], query_block, key_block)
    return cpu.Call(q, k, v, ids, counts, blocks, seed, dropout_p, scale, transform)


def _attention_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    *rest, sink = args
    _check_sink(rest[0], sink)
    return _with_sink(*cpu.forward(_call(*rest)), sink)


def attention_on_kernels(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    """`sptc::sparse_attention` by launches of emitted kernels."""
    *rest, sink = operands
    _check_heads(q, k, operands[3], operands[4])
    _check_sink(q, sink)
    return _with_sink(*kernels.forward(q, k, v, ids, counts, *rest), sink)


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """`out` and `lse` with one more term in the sum of each row's softmax, to which no value belongs.

    Kernels need not know of it, and least of all backward's: of these two and the gradient of this `out` they compute the gradients of q, k
    and v as they always do, weights e^(score - lse) and slopes of the scores weight * (grad_out . v - grad_out . out).
    """
    if sink is None:
        return out, lse
    term = sink.squeeze(-1).to(lse.dtype)
    share = torch.sigmoid(lse - term).masked_fill(lse == -math.inf, 0.0)  # a row that sees nothing, whatever the sink is
    return (out * share.unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, term)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    predicate, tensors, sizes, mask, bias, *_, sink = operands
    _check_heads(q, k, mask, bias)
    _check_sink(q, sink)
    parse(predicate).check(tensors, sizes)
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_rows(q, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=lse)


def _backward_cpu(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, need = rest
    return cpu.backward(_call(q, k, v, *operands), grad_out, out, lse, need)


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(empty_rows(x, x.shape) if wanted else x.new_empty(0) for x, wanted in zip((q, k, v), rest[-1], strict=True))


def _select_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.gradients = tuple([None] * len(x) if _is_tensor_list(x) else None for x in inputs)


def _select_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return ctx.gradients


def _is_tensor_list(x: Any) -> bool:
    """Whether autograd counts `x` among lists of tensors, and wants a list of gradients for it: an empty list of sizes it does too."""
    return isinstance(x, list | tuple) and all(isinstance(item, Tensor) for item in x)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ids, counts, predicate, tensors, sizes, mask, bias, seed, dropout_p, scale, query_block, key_block, transform, sink = inputs
    if bias is not None and bias.requires_grad:
        raise RuntimeError("sptc::sparse_attention has no gradient for bias; detach it, or keep this attention dense")
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, ids, counts, mask, bias, seed, sink, *tensors)
    ctx.plain = predicate, sizes, dropout_p, scale, query_block, key_block, transform


def _attention_backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, ids, counts, mask, bias, seed, sink, *tensors = ctx.saved_tensors
    predicate, sizes, *numbers = ctx.plain
    need = list(ctx.needs_input_grad[:3])
    grads = torch.ops.sptc.sparse_attention_backward(
        grad_out, q, k, v, out, lse, ids, counts, predicate, tensors, sizes, mask, bias, seed, *numbers, need
    )
    wanted = (grad if needed else None for grad, needed in zip(grads, need, strict=True))
    grad_sink = _grad_sink(grad_out, out, lse, sink) if ctx.needs_input_grad[-1] else None
    return *wanted, None, None, None, [None] * len(tensors), [] if not sizes else None, *[None] * 8, grad_sink


def _grad_sink(grad_out: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """[b, h, n, 1]: the sink's weight is one of the softmax's, and its value is zero."""
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    weight = torch.exp(sink.to(lse.dtype) - lse.unsqueeze(-1)).masked_fill(lse.unsqueeze(-1) == -math.inf, 0.0)  # no key and no sink
    return (-weight * delta).to(sink.dtype)


def _no_second_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("sptc::sparse_attention has no second derivative; keep this attention dense where create_graph=True is needed")


implement(_lib, "select_blocks", _select_cpu, select_on_kernels)
implement(_lib, "sparse_attention", _attention_cpu, attention_on_kernels)
implement(_lib, "sparse_attention_backward", _backward_cpu, kernels.backward)
torch.library.register_fake("sptc::select_blocks", _select_fake, lib=_lib)
torch.library.register_fake("sptc::sparse_attention", _attention_fake, lib=_lib)
torch.library.register_fake("sptc::sparse_attention_backward", _backward_fake, lib=_lib)
torch.library.register_autograd("sptc::select_blocks", _select_backward, setup_context=_select_setup, lib=_lib)
torch.library.register_autograd("sptc::sparse_attention", _attention_backward, setup_context=_attention_setup, lib=_lib)
torch.library.register_autograd("sptc::sparse_attention_backward", _no_second_backward, lib=_lib)
autocast.register(_lib, "select_blocks", ("q", "k"))
autocast.register(_lib, "sparse_attention", ("q", "k", "v"))
autocast.register(_lib, "sparse_attention_backward", ())  # its dtypes are those of forward
