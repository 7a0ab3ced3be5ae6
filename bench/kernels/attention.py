"""Times of sparse attention beside SDPA's flash kernel and FlexAttention with the same block lists, causal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.kernels import steps
from bench.kernels.cases import AttentionCase, attention_operands
from bench.kernels.clock import Call, Timing, alternating
from sptc.codegen.block_lists import block_count
from sptc.codegen.kernels.selection import default_blocks

_FLEX_LENGTHS = (2048, 8192, 32768)  # compiling it takes longest of all
_TOKENS = 32768


def _case(length: int, size: int, density: float = 1 / 8) -> AttentionCase:
    """With the blocks that a user gets."""
    blocks = default_blocks(length, length, density, own=True)
    return AttentionCase(f"causal {length} d{size}", _TOKENS // length, length, 16, 16, size, "causal", density, *blocks)


CASES = tuple(_case(length, size) for size in (64, 128) for length in (2048, 8192, 32768, 1024, 4096, 16384))


def measure(case: AttentionCase, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Timing]:
    """Forward, and forward with backward, of each way; `sparse` selects its blocks, `attend` is given them."""
    o = attention_operands(case, device, dtype)
    ids, counts, *_ = steps.select(case, o)
    leaves = [x.requires_grad_() for x in (o.q, o.k, o.v)]

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(o.q, o.k, o.v, is_causal=True, enable_gqa=case.heads != case.kv_heads)

    def sparse() -> Tensor:
        lists = steps.select(case, o)
        return steps.attend(case, o, *lists[:2])[0]

    ways: dict[str, Callable[[], Tensor]] = {"flash": flash, "sparse": sparse, "attend": lambda: steps.attend(case, o, ids, counts)[0]}
    if device.type == "cuda" and case.length in _FLEX_LENGTHS:
        ways["flex"] = flex(case, o, ids, counts)
    calls: dict[str, Call] = {"select": lambda: steps.select(case, o)}
    for name, way in ways.items():
        calls[f"{name} forward"] = way
        calls[f"{name} forward+backward"] = lambda way=way: torch.autograd.grad(way(), leaves, o.grad)  # type: ignore[misc]
    return alternating(calls, rounds, device)


def flex(case: AttentionCase, o: Any, ids: Tensor, counts: Tensor) -> Callable[[], Tensor]:
    """FlexAttention compiled for these lists: with the tile sizes that Inductor finds best among those that divide the blocks."""
    mask = block_mask(case, ids, counts)
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda: compiled(o.q, o.k, o.v, block_mask=mask, scale=case.scale, enable_gqa=case.heads != case.kv_heads)


def block_mask(case: AttentionCase, ids: Tensor, counts: Tensor) -> BlockMask:
    """The lists as FlexAttention takes them: blocks that a tile sees whole apart from those that the diagonal cuts."""
    tiles, blocks = (block_count(case.length, block) for block in (case.query_block, case.key_block))
    listed = torch.arange(ids.shape[-1], device=ids.device) < counts.unsqueeze(-1)
    kept = torch.zeros((*ids.shape[:-1], blocks), dtype=torch.int32, device=ids.device).scatter_add_(-1, ids.long(), listed.int()) > 0
    last_key = torch.arange(1, blocks + 1, device=ids.device) * case.key_block - 1
    first_query = torch.arange(tiles, device=ids.device).unsqueeze(1) * case.query_block
    whole = last_key <= first_query if case.own else torch.ones((tiles, blocks), dtype=torch.bool, device=ids.device)

    def causal(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    lists = [part.repeat_interleave(case.heads // case.kv_heads, 1) for part in (kept & ~whole, kept & whole)]
    (number, index), (full_number, full_index) = (
        (part.sum(-1, dtype=torch.int32), part.int().sort(dim=-1, descending=True, stable=True).indices.int()) for part in lists
    )
    return BlockMask.from_kv_blocks(
        number, index, full_number, full_index,
        BLOCK_SIZE=(case.query_block, case.key_block), mask_mod=causal if case.own else None, seq_lengths=(case.length, case.length),
    )  # fmt: skip


def rows(case: AttentionCase, times: dict[str, Timing]) -> list[dict[str, Any]]:
    """Table rows: milliseconds of each way, and how many times faster sparse attention is, selection included."""
    found = []
    for part in ("forward", "forward+backward"):
        ms = {name: times[f"{name} {part}"].ms for name in ("flash", "flex", "sparse", "attend") if f"{name} {part}" in times}
        found.append(
            {
                "case": case.name,
                "part": part,
                **{f"{name} ms": value for name, value in ms.items()},
                "over flash": ms["flash"] / ms["sparse"],
                "over flex": ms["flex"] / ms["sparse"] if "flex" in ms else None,
                "selection": times["select"].ms / ms["sparse"],
                "host ms": times[f"sparse {part}"].host_ms,
                "flash MiB": times[f"flash {part}"].peak_mib,
                "sparse MiB": times[f"sparse {part}"].peak_mib,
            }
        )
    return found


def small() -> AttentionCase:
    """A case of the same kind for a machine without a GPU."""
    return replace(CASES[0], name="small", batch=1, length=64, heads=2, kv_heads=1, size=16, query_block=32, key_block=16)
