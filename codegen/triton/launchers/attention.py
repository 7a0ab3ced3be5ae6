"""Block-sparse attention on Triton: the launches behind `sptc::sparse_attention` and its backward.

`docs/design/operators.md` is the contract, `codegen/reference/attention.py` the definition. Nothing here reads a value from the device,
so all of it runs on fake tensors under `recorded()`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sptc.codegen.reference.block_lists import block_count
from sptc.codegen.reference.layout import empty_rows
from sptc.codegen.reference.random import drop_threshold
from sptc.codegen.triton.launchers.attention_tiles import BACKWARD_KV, BACKWARD_Q, FORWARD
from sptc.codegen.triton.launchers.inverted import inverted_lists
from sptc.codegen.triton.launchers.mask import KernelMask
from sptc.codegen.triton.launchers.precision import product_precision
from sptc.codegen.triton.launchers.sizes import side, strided
from sptc.codegen.triton.run.launch import Argument, launch
from sptc.codegen.triton.spec import Constant, KernelSpec
from sptc.codegen.triton.target import KERNEL_DTYPES, target_of
from sptc.codegen.triton.tuning.tiling import Table

_LOG2_E = 1.4426950408889634


def forward(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    """out [b, h, n, d_v] in the dtype of q, and lse fp32 [b, h, n]: `sptc::sparse_attention`.

    Raises:
        TypeError: q, k and v are not all of one dtype among bfloat16, float16 and float32.
    """
    call = _Call.of(q, k, v, ids, counts, *operands)
    out, lse = empty_rows(q, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
    scale_first = call.mask.bias is not None or call.scale <= 0.0 or call.transforms
    _by_lists(call, FORWARD, {"SCALE_FIRST": scale_first}, strided("out", out, "bhn") | {"lse_ptr": lse})
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor, counts: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v: `sptc::sparse_attention_backward`. One that is not needed is an empty tensor of shape [0].

    Raises:
        TypeError: q, k and v are not all of one dtype among bfloat16, float16 and float32.
    """
    *shared, need = operands
    call = _Call.of(q, k, v, ids, counts, *shared)
    need_q, need_k, need_v = need
    grad_q, grad_k, grad_v = (empty_rows(x, x.shape) if wanted else x.new_empty(0) for x, wanted in zip((q, k, v), need, strict=True))
    delta = torch.empty_like(lse)
    incoming = strided("grad_out", _rows(grad_out.to(q.dtype)), "bhn")
    incoming |= {"lse_ptr": lse.contiguous(), "delta_ptr": delta}
    if need_q or need_k:  # without need_q for delta alone
        _by_lists(call, BACKWARD_Q, {"NEED_Q": need_q}, incoming | strided("out", _rows(out), "bhn") | strided("grad_q", grad_q, "bhn"))
    if need_k or need_v:
        results = strided("grad_k", grad_k, "bhm") | strided("grad_v", grad_v, "bhm")
        _by_keys(call, {"NEED_K": need_k, "NEED_V": need_v}, incoming | results)
    return grad_q, grad_k, grad_v


@dataclass(frozen=True)
class _Call:
    """The operands that forward and backward share. Features of q, k and v follow each other in memory."""

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    counts: Tensor
    mask: KernelMask
    seed: Tensor | None
    dropout_p: float
    scale: float
    query_block: int
    key_block: int
    transform: str

    def __post_init__(self) -> None:
        if self.q.dtype not in KERNEL_DTYPES or not self.q.dtype == self.k.dtype == self.v.dtype:
            raise TypeError(
                "Triton attention takes q, k and v of one dtype among bfloat16, float16 and float32, "
                f"got {self.q.dtype}, {self.k.dtype} and {self.v.dtype}"
            )

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, predicate: str, mask_tensors: Sequence[Tensor],
        mask_sizes: Sequence[int], mask: Tensor | None, bias: Tensor | None, *numbers: Any,
    ) -> _Call:  # fmt: skip
        """From the arguments of the operator."""
        operands = KernelMask(predicate, mask_tensors, mask_sizes, mask, bias, (*q.shape[:3], k.shape[2]))
        return cls(_rows(q), _rows(k), _rows(v), ids.contiguous(), counts.contiguous(), operands, *numbers)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def rows(self) -> int:
        """Rows of a tile: its queries in each head of the group."""
        return self.group * self.query_block

    @property
    def drops(self) -> bool:
        return self.seed is not None and self.dropout_p > 0.0

    @property
    def transforms(self) -> bool:
        return self.transform != "u0"

    @property
    def hooks(self) -> dict[str, str]:
        return self.mask.hooks() | ({"transform": self.transform} if self.transforms else {})

    @property
    def aligned(self) -> bool:
        """Whether each four keys of a block share the words of one counter."""
        return self.k.shape[2] % 4 == 0 and self.key_block % 4 == 0

    @functools.cached_property
    def _through_registers(self) -> bool:
        """Whether matrix units read both operands from registers: mma.sync and mfma, not wgmma and tcgen05."""
        return not target_of(self.q.device).warpgroups

    @functools.cached_property
    def _precision(self) -> str:
        return product_precision(self.q.dtype, self.q.device)

    @functools.cached_property
    def tile_facts(self) -> dict[str, int]:
        return {
            "head_dim": side(self.q.shape[3]),
            "value_dim": side(self.v.shape[3]),
            "itemsize": self.q.element_size() * (2 if self._precision == "tf32x3" else 1),  # each operand is split into two
            "rows": self.rows,
            "key_block": self.key_block,
            "dropout": int(self.drops),
            "transform": int(self.transforms),
            "through_registers": int(self._through_registers),
        }

    def constants(self, block_m: int, whole: bool) -> dict[str, Constant]:
        """Constants of all three templates. `whole`: a step of a program takes its keys and its rows from one block and one tile."""
        known = self.mask.constants()
        one_head = self.group == 1 or self.query_block % block_m == 0
        names = ("TENSORS", "STRIDES", "SIZES", "PREDICATE", "READS_TENSORS", "MASK", "BIAS", "BIAS_LEAST")
        return {name: known[name] for name in names} | {
            # What is asked for a whole rectangle is asked for one head. Products through registers are laid out by what they feed, and
            # Triton looks past no branch: it would spread a row's keys over warps, which costs more than testing all elements.
            "SKIP_TEST": whole and not self._through_registers and bool(known["BY_RANGE"]) and (one_head or not self.mask.parsed.uses("h")),
            "MASK_BY_ROW": bool(known["MASK_BY_QUERY"] or (known["MASK_BY_HEAD"] and not one_head)),
            "BIAS_BY_ROW": bool(known["BIAS_BY_QUERY"] or (known["BIAS_BY_HEAD"] and not one_head)),
            "TRANSFORM": self.transforms,
            "DROPOUT": self.drops,
            "GROUP": self.group,
            "QUERY_BLOCK": self.query_block,
            "KEY_BLOCK": self.key_block,
            "HEAD_DIM": self.q.shape[3],
            "VALUE_DIM": self.v.shape[3],
            "BLOCK_D": side(self.q.shape[3]),
            "BLOCK_V": side(self.v.shape[3]),
            "PRECISION": self._precision,
        }

    def arguments(self) -> dict[str, Argument]:
        """Arguments of all three templates."""
        known = self.mask.arguments() | strided("q", self.q, "bhn") | strided("k", self.k, "bhm") | strided("v", self.v, "bhm")
        known |= {"scale": self.scale, "scale_log2": self.scale * _LOG2_E}
        known |= {"h_kv": self.k.shape[1], "n": self.q.shape[2], "m": self.k.shape[2]}
        if self.seed is not None and self.drops:
            known |= {
                "seed_ptr": self.seed,
                "threshold": drop_threshold(self.dropout_p),
                "keep_scale": 1.0 / max(1.0 - self.dropout_p, 2.0**-32),
            }
        return known


def _by_lists(call: _Call, table: Table, constants: dict[str, Constant], arguments: dict[str, Argument]) -> None:
    """Launch a kernel whose programs take rows of one tile and walk its list."""
    b, h_kv, tiles, width = call.ids.shape
    tiling = table.choose(target_of(call.q.device), **call.tile_facts)
    tile = dict(tiling.constants)
    block_m, block_n = _cut(tile["BLOCK_M"], call.rows), _cut(tile["BLOCK_N"], width * call.key_block)
    whole = call.key_block >= block_n
    even = whole and call.key_block % block_n == 0 and call.k.shape[2] % call.key_block == 0
    constants = (
        constants
        | call.constants(block_m, whole)
        | {"BLOCK_M": block_m, "BLOCK_N": block_n, "EVEN_KEYS": bool(even), "DROPOUT_IN_RUNS": whole and call.aligned}
    )
    spec = KernelSpec.of(table.template, constants, call.hooks, _warps(tiling.num_warps, block_m, tile["BLOCK_M"]), tiling.num_stages)
    lists: dict[str, Argument] = {"ids_ptr": call.ids, "counts_ptr": call.counts, "tiles": tiles, "width": width}
    launch(spec, (b * h_kv * tiles * block_count(call.rows, block_m),), call.q.device, arguments | call.arguments() | lists)


def _by_keys(call: _Call, constants: dict[str, Constant], arguments: dict[str, Argument]) -> None:
    """Launch the kernel whose programs take keys of one block and walk the tiles that keep it."""
    b, h_kv, tiles, _ = call.ids.shape
    blocks = block_count(call.k.shape[2], call.key_block)
    tiling = BACKWARD_KV.choose(target_of(call.q.device), **call.tile_facts)
    tile = dict(tiling.constants)
    block_m, block_n = _cut(tile["BLOCK_M"], call.rows * tiles), _cut(tile["BLOCK_N"], call.key_block)
    whole = call.rows >= block_m
    even = whole and call.rows % block_m == 0 and call.q.shape[2] % call.query_block == 0
    constants = (
        constants
        | call.constants(block_m, whole)
        | {"BLOCK_M": block_m, "BLOCK_N": block_n, "EVEN_QUERIES": bool(even), "DROPOUT_IN_RUNS": call.aligned}
    )
    warps = _warps(tiling.num_warps, block_n, tile["BLOCK_N"])
    spec = KernelSpec.of(BACKWARD_KV.template, constants, call.hooks, warps, tiling.num_stages)
    inverted, offsets = inverted_lists(call.ids, call.counts, blocks)
    lists: dict[str, Argument] = {"tiles_ptr": inverted, "offsets_ptr": offsets, "blocks": blocks, "capacity": inverted.shape[2]}
    launch(spec, (b * h_kv * blocks * block_count(call.key_block, block_n),), call.q.device, arguments | call.arguments() | lists)


def _rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous: x itself, whatever its other strides, where that is so."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _cut(block: int, length: int) -> int:
    """A tile size of at most `block` that is not far more than `length`."""
    return min(block, side(max(length, 1)))


def _warps(warps: int, block: int, full: int) -> int:
    """Fewer warps for a tile that was cut down, though no fewer than a matrix unit of Hopper takes."""
    return max(min(warps, 4), warps * block // full)
