"""FlexAttention with the block lists of sparse attention: last, since finding its tile sizes takes a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.gpu.journal import Figures
from bench.gpu.layers import timed_rows
from bench.gpu.sizes import Sizes
from bench.gpu.stage import Limit
from bench.gpu.timing import one
from bench.kernels import steps
from bench.kernels.cases import AttentionCase, AttentionOperands, attention_operands
from sptc.codegen.reference.block_lists import block_count


def measure(case: AttentionCase, sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """Without selection, which the other forms include."""
    o = attention_operands(case, sizes.device, sizes.dtype)
    ids, counts, *_ = steps.select(case, o)
    if sizes.dry:  # it has no backward on a CPU
        yield {"forward_ms": one(flex(case, o, ids, counts, sizes.dry), sizes, limit).ms}
        return
    leaves = [x.requires_grad_() for x in (o.q, o.k, o.v)]
    yield from timed_rows(flex(case, o, ids, counts, sizes.dry), leaves, o.grad, sizes, limit)


def flex(case: AttentionCase, o: AttentionOperands, ids: Tensor, counts: Tensor, dry: bool) -> Callable[[], Tensor]:
    """FlexAttention compiled for these lists: with the tile sizes that Inductor finds best among those that divide the blocks."""
    mask = block_mask(case, ids, counts)
    how = {"backend": "aot_eager"} if dry else {"mode": "max-autotune-no-cudagraphs"}
    compiled = torch.compile(flex_attention, dynamic=False, **how)
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
