"""The definition of the routed FFN ops, in plain differentiable torch: slow, in the dtype of its inputs, true in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sptc import expression as ex
from sptc.codegen.random import keep_mask

_FORWARD = {
    "absolute": torch.abs,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "elu": torch.ops.aten.elu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    **{name: getattr(torch.nn.functional, name) for name in ("silu", "mish", "softplus", "hardtanh", "hardswish", "hardsigmoid")},
    **{name: getattr(torch, name) for name in ("relu", "clamp", "clamp_min", "clamp_max", "maximum", "sigmoid", "tanh")},
    **{name: getattr(torch, name) for name in ("exp", "erf", "sqrt", "rsqrt")},
}


def activation(text: str, us: Sequence[Tensor]) -> Tensor:
    """The activation `text` of `us`, op by op as written, differentiable by autograd.

    Raises:
        ExpressionError: `text` is no activation.
    """
    expr = ex.parse(text).expression
    values = dict(zip(ex.SYMBOLS, us, strict=False))

    def value(e: Any) -> Any:  # a tensor, or a number
        if e in values:
            return values[e]
        if e.is_Number:
            return float(e)
        args = [value(arg) for arg in e.args]
        if e.is_Pow:
            return args[0] ** args[1]
        if not (e.is_Add or e.is_Mul):
            return _FORWARD[type(e).__name__](*args)
        total = args[0]
        for arg in args[1:]:
            total = total + arg if e.is_Add else total * arg
        return total

    return value(expr)


def route(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best blocks of each token, as lists of tokens by block.

    Args:
        scores: [N, G]; ties go to the lower block, a NaN counts as the highest.
        active: blocks a token uses, 1 to G; on average if `keep` is given.
        keep: bool [N], the tokens that get more blocks than the others (see `budgets`).

    Returns:
        tokens int32 [N * active] (ascending within a block), offsets int32 [G + 1], index int64 [N * active] = token * G + block.
    """
    count, blocks = scores.shape
    shares = [active] * count if keep is None else budgets(keep.tolist(), blocks, active)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices.tolist()
    lists = [[t for t in range(count) if g in order[t][: shares[t]]] for g in range(blocks)]
    offsets = torch.tensor([sum(map(len, lists[:g])) for g in range(blocks + 1)], dtype=torch.int32)
    index = torch.tensor([t * blocks + g for g, tokens in enumerate(lists) for t in tokens], dtype=torch.int64)
    return (index // blocks).to(torch.int32), offsets, index


def budgets(keep: Sequence[bool], blocks: int, active: int) -> list[int]:
    """How many blocks each token gets, len(keep) * active in all.

    A kept token gets as many as leave the others max(1, active // 2) each, the same for every kept one, at most all `blocks`. The others
    share the rest as evenly as whole blocks allow, those with one more evenly spaced; none has more than `active`. So with none kept, with
    all kept, and for `active` of 1 or `blocks`, every token gets `active`.
    """
    kept = sum(keep)
    others = len(keep) - kept
    total = len(keep) * active
    most = min(blocks, (total - others * max(1, active // 2)) // kept) if kept else 0
    rest = total - kept * most
    shares = iter([(i + 1) * rest // others - i * rest // others for i in range(others)])
    return [most if flag else next(shares) for flag in keep]


def routed_ffn(
    x: Tensor,
    up: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    biased: Sequence[int],
    low: Sequence[Tensor],
    up_B: Sequence[Tensor],
    adapted: Sequence[int],
    down: Tensor,
    down_A: Tensor | None,
    tokens: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    lora_seed: Tensor | None,
    dropout_p: float,
    lora_dropout_p: float,
    activation_text: str,
) -> tuple[Tensor, Tensor]:
    """y [N, d_out] and low_out [N, r] ([0] without down_A): every list entry on its own, with its own copy of its block's weights.

    The arguments are those of `sptc::routed_ffn` (docs/architecture.md).
    """
    hidden = up[0].shape[0]
    entries = int(offsets[-1])
    width = hidden // (len(offsets) - 1)
    block = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())  # [entries]
    token = tokens[:entries].long()
    units = block.unsqueeze(1) * width + torch.arange(width)  # [entries, width]
    us = [torch.einsum("sd,shd->sh", x[token], w[units]) for w in up]
    for bias, i in zip(up_bias, biased, strict=True):
        us[i] = us[i] + bias[units]
    for factor, b, i in zip(low, up_B, adapted, strict=True):
        us[i] = us[i] + torch.einsum("sr,shr->sh", factor[token], b[units])
    a = activation(activation_text, us)
    if scale is not None:
        a = a * scale[:entries].unsqueeze(1)
    index = token.unsqueeze(1) * hidden + units
    a = _dropout(a, seed, index, dropout_p)
    y = x.new_zeros(x.shape[0], down.shape[1]).index_add(0, token, torch.einsum("sh,sho->so", a, down[units]))
    if down_A is None:
        return y, x.new_empty(0)
    low_entries = torch.einsum("sh,shr->sr", _dropout(a, lora_seed, index, lora_dropout_p), down_A.t()[units])
    return y, x.new_zeros(x.shape[0], down_A.shape[0]).index_add(0, token, low_entries)


def _dropout(a: Tensor, seed: Tensor | None, index: Tensor, p: float) -> Tensor:
    if p == 0.0:
        return a
    if seed is None:
        raise ValueError(f"dropout with p={p} needs a seed")
    keep = keep_mask(seed, index, p)
    return torch.where(keep, a / (1.0 - p), 0.0) if p < 1.0 else torch.zeros_like(a)
