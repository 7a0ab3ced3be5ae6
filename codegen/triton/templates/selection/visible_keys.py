"""Keys that no operand of the mask, looked at alone, hides from every query."""

import triton
import triton.language as tl

from sptc.codegen.triton.templates.language import allowed, many


@triton.jit
def visible_keys(
    visible_ptr, keys, T: many("TENSORS"), T_STRIDE: many("STRIDES"), S: many("SIZES"), mask_ptr, mask_stride_b, mask_stride_h,
    mask_stride_k, GROUP: tl.constexpr, KEYS: tl.constexpr, PREDICATE: tl.constexpr, MASK: tl.constexpr, TENSORS: tl.constexpr,
    STRIDES: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """visible bool [1 or b, 1 or h_kv, keys]: some head of the group sees the key.

    The predicate does not look at q. mask bool [b, h, keys] by strides: what the tensor operands show to some query.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2)
    k = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    live = k < keys
    seen = tl.zeros((KEYS,), dtype=tl.int32)
    for member in range(GROUP):
        h = head * GROUP + member
        shown = live
        if PREDICATE:
            keep = allowed(
                batch, h, tl.zeros((1, 1), dtype=tl.int32), k[None, :], live[None, :], *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES]
            )
            shown = shown & tl.reshape(keep, (KEYS,))
        if MASK:
            at = batch.to(tl.int64) * mask_stride_b + h.to(tl.int64) * mask_stride_h + k.to(tl.int64) * mask_stride_k
            shown = shown & tl.load(mask_ptr + at, mask=live, other=False).to(tl.int1)
        seen = seen | shown.to(tl.int32)
    row = batch.to(tl.int64) * tl.num_programs(1) + head
    tl.store(visible_ptr + row * keys + k, seen != 0, mask=live)
