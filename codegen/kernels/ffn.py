"""The routed FFN on Triton: launchers of `sptc::routed_ffn` and its backward. Plain Python that never waits for the device.

Forward is ffn_up (gathered tokens to hidden units), grouped_product (a block's units to its share of y, one row for each list entry) and
gather_sum (a token's shares to y). Shares in memory instead of one fused sum are the price of a sum without atomics that is the same
every time: for N tokens in G' blocks each they are written and read once, 4 * N * G' * d_out bytes in bf16, in which time an H100 does
about 900 * N * G' * d_out operations, while the product that makes them takes 2 * N * G' * (d_ff / G) * d_out. At d_ff / G = 1376
(LLaMA 7B in 8 blocks) that is a third of one of three products; blocks of few units pay relatively more.

Backward is ffn_grad_hidden (through down, dropout, the scores and the activation), the same two kernels for x and for the LoRA inputs, and
grouped_outer and grouped_sum for the weights and biases that `need` asks for. Hidden units are computed anew from `pre`, not kept.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sptc.codegen.ffn_need import Need
from sptc.codegen.kernels.ffn_tiles import GRAD_HIDDEN, OUTER, PRODUCT, SUM, UP
from sptc.codegen.kernels.precision import product_precision
from sptc.codegen.kernels.route import Index, invert
from sptc.codegen.launch import Argument, launch
from sptc.codegen.random import drop_threshold
from sptc.codegen.spec import Constant, KernelSpec
from sptc.codegen.target import target_of
from sptc.codegen.tiling import Table

_SMALLEST = 16  # tl.dot takes no smaller matrices
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class _Dropout:
    """Inverted dropout of hidden units. An element's fate depends on the seed, its token and its unit only."""

    seed: Tensor | None
    p: float

    def __post_init__(self) -> None:
        """Raises ValueError if it drops and has no seed."""
        if self.p > 0.0 and self.seed is None:
            raise ValueError(f"sptc::routed_ffn needs a seed for dropout with p={self.p}")

    @property
    def active(self) -> bool:
        return self.p > 0.0

    def arguments(self, prefix: str = "") -> dict[str, Argument | None]:
        kept = 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0
        return {f"{prefix}seed": self.seed, f"{prefix}threshold": drop_threshold(self.p), f"{prefix}kept": kept}


@dataclass(frozen=True)
class _Lists:
    """The lists of a call and the sizes that all its kernels share."""

    tokens: Tensor  # int32 [capacity]
    offsets: Tensor  # int32 [G + 1]
    count: int  # tokens of x
    width: int  # hidden units of a block
    dtype: torch.dtype

    @property
    def capacity(self) -> int:
        return self.tokens.shape[0]

    @property
    def blocks(self) -> int:
        return self.offsets.shape[0] - 1

    @functools.cached_property
    def index(self) -> Index:
        return invert(self.tokens, self.offsets, self.count)

    def tiles(self, table: Table, limits: Mapping[str, int], **facts: int) -> tuple[dict[str, int], int, int]:
        """Tile constants of `table`, none larger than its `limits` call for, with num_warps and num_stages."""
        tiling = table.choose(target_of(self.tokens.device), itemsize=self.dtype.itemsize, **facts)
        constants = {name: min(size, _lanes(limits[name])) if name in limits else size for name, size in tiling.constants}
        if "SLICES" in constants:
            constants["SLICES"] = min(constants["SLICES"], constants["BLOCK_N"] // _SMALLEST)
        return constants, tiling.num_warps, tiling.num_stages

    def by_rows(
        self,
        table: Table,
        columns: int,
        depth: int,
        facts: Mapping[str, int],
        constants: Mapping[str, Constant],
        arguments: Mapping[str, Argument | None],
        hooks: Mapping[str, str] | None = None,
    ) -> None:
        """Launch a kernel whose programs compute tiles of list entries x `columns`, summed over `depth`."""
        sizes, warps, stages = self.tiles(table, {"BLOCK_N": columns, "BLOCK_K": depth}, **facts)
        row_tiles = _row_tiles(self.capacity, self.blocks, sizes["BLOCK_M"])
        shared: dict[str, Constant] = {
            "BLOCKS": self.blocks,
            "LANES": _power_of_two(self.blocks + 1),
            "WIDTH": self.width,
            "PRECISION": product_precision(self.dtype, self.tokens.device),
        }
        spec = KernelSpec.of(table.template, {**sizes, **shared, **constants}, hooks, warps, stages)
        given = {"tokens": self.tokens, "offsets": self.offsets, "capacity": self.capacity, "row_tiles": row_tiles, **arguments}
        _launch(spec, row_tiles * -(-columns // sizes["BLOCK_N"]), self.tokens.device, given)


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
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, d_out], low_out [N, r] or [0], pre [k, entries, width]; see `sptc::routed_ffn` in docs/architecture.md.

    Raises:
        TypeError: operands are of a dtype that kernels do not compute in, or of several.
        ValueError: dropout without a seed.
    """
    _check_dtypes(x, *up, *up_bias, *low, *up_B, down, *([] if down_A is None else [down_A]))
    lists = _lists(x, tokens, offsets, down.shape[0])
    dropout, lora_dropout = _Dropout(seed, dropout_p), _Dropout(lora_seed, lora_dropout_p)
    pre = x.new_empty((len(up), lists.capacity, lists.width))
    hidden = x.new_empty((lists.capacity, lists.width))
    _up(lists, x, up, dict(zip(biased, up_bias, strict=True)), dict(zip(adapted, zip(low, up_B, strict=True), strict=True)),
        scale, dropout, activation, pre, hidden)  # fmt: skip
    y = _gathered_product(lists, [hidden], [down])
    low_out = x.new_empty(0) if down_A is None else _gathered_product(lists, [hidden], [down_A.t()], lora_dropout)
    return y, low_out, pre


def routed_ffn_backward(
    grad_y: Tensor,
    grad_low_out: Tensor | None,
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
    activation: str,
    pre: Tensor,
    need: Sequence[bool],
) -> list[Tensor]:
    """Gradients in the order of `need`, [0] where not needed.

    Raises:
        TypeError, ValueError: as `routed_ffn`; `need` has not one entry for each gradient.
    """
    adapters = [t for t in (down_A, grad_low_out) if t is not None]
    _check_dtypes(x, grad_y, *up, *up_bias, *low, *up_B, down, *adapters)
    lists = _lists(x, tokens, offsets, down.shape[0])
    dropout, lora_dropout = _Dropout(seed, dropout_p), _Dropout(lora_seed, lora_dropout_p)
    wanted = Need.read(need, len(up), len(up_bias), len(low))
    through = None if down_A is None or grad_low_out is None else (down_A, _rows(grad_low_out))
    x, grad_y = _rows(x), _rows(grad_y)

    nothing = x.new_empty(0)
    needs_pre = wanted.x or any((*wanted.up, *wanted.up_bias, *wanted.low, *wanted.up_B))
    needs_scale = wanted.scale and scale is not None
    needs_hidden = wanted.down or (wanted.down_A and through is not None)
    grad_pre = torch.empty_like(pre) if needs_pre else None
    hidden = pre.new_empty(pre.shape[1:]) if needs_hidden else None
    grad_scale = nothing
    if needs_pre or needs_scale or needs_hidden:
        parts = _grad_hidden(lists, grad_y, down, through, scale, dropout, lora_dropout, activation, pre, grad_pre, needs_scale, hidden)
        if scale is not None and needs_scale:
            grad_scale = parts.sum(0).to(scale.dtype)

    grad_x, grad_up, grad_bias, grad_low, grad_B = (
        nothing,
        [nothing] * len(up),
        [nothing] * len(up_bias),
        [nothing] * len(low),
        [nothing] * len(low),
    )
    if grad_pre is not None:
        if wanted.x:
            grad_x = _gathered_product(lists, grad_pre.unbind(0), up)
        for i, weight in enumerate(up):
            if wanted.up[i]:
                grad_up[i] = _outer(lists, grad_pre[i], x, torch.empty(weight.shape, dtype=x.dtype, device=x.device))
        for j, i in enumerate(biased):
            if wanted.up_bias[j]:
                grad_bias[j] = _column_sums(lists, grad_pre[i])
        for j, i in enumerate(adapted):
            if wanted.low[j]:
                grad_low[j] = _gathered_product(lists, [grad_pre[i]], [up_B[j]])
            if wanted.up_B[j]:
                grad_B[j] = _outer(lists, grad_pre[i], _rows(low[j]), torch.empty(up_B[j].shape, dtype=x.dtype, device=x.device))
    grad_down = grad_A = nothing
    if hidden is not None and wanted.down:
        grad_down = _outer(lists, hidden, grad_y, torch.empty(down.shape, dtype=x.dtype, device=x.device))
    if wanted.down_A and down_A is not None:
        if hidden is not None and through is not None:
            grad_A = torch.empty(down_A.shape, dtype=x.dtype, device=x.device)
            _outer(lists, hidden, through[1], grad_A.t(), lora_dropout)
        else:
            grad_A = torch.zeros(down_A.shape, dtype=x.dtype, device=x.device)
    return [grad_x, *grad_up, *grad_bias, *grad_low, *grad_B, grad_down, grad_A, grad_scale]


def _up(
    lists: _Lists,
    x: Tensor,
    up: Sequence[Tensor],
    bias: Mapping[int, Tensor],
    adapters: Mapping[int, tuple[Tensor, Tensor]],
    scale: Tensor | None,
    dropout: _Dropout,
    activation: str,
    pre: Tensor,
    hidden: Tensor,
) -> None:
    """Fill `pre` and `hidden`."""
    x = _rows(x)
    arguments: dict[str, Argument | None] = {"x": x, "x_row": x.stride(0), "scale": _contiguous(scale), "pre": pre, "hidden": hidden}
    arguments |= dropout.arguments()
    for i, weight in enumerate(up):
        arguments |= {f"up_{i}": weight, f"up_unit_{i}": weight.stride(0), f"up_feature_{i}": weight.stride(1)}
    for i, vector in bias.items():
        arguments[f"bias_{i}"] = vector.contiguous()
    for i, (factor, adapter) in adapters.items():
        factor = _rows(factor)
        arguments |= {f"low_{i}": factor, f"low_row_{i}": factor.stride(0), f"rank_{i}": adapter.shape[1]}
        arguments |= {f"up_B_{i}": adapter, f"up_B_unit_{i}": adapter.stride(0), f"up_B_rank_{i}": adapter.stride(1)}
    constants: dict[str, Constant] = {
        "UPS": len(up),
        "BIASED": sum(1 << i for i in bias),
        "ADAPTED": sum(1 << i for i in adapters),
        "SCALED": scale is not None,
        "DROPOUT": dropout.active,
        "DEPTH": x.shape[1],
        "BLOCK_R": _rank_lanes([adapter.shape[1] for _, adapter in adapters.values()]),
    }
    facts = {"ups": len(up), "dropouts": int(dropout.active), "width": lists.width, "depth": x.shape[1]}
    lists.by_rows(UP, lists.width, x.shape[1], facts, constants, arguments, {"activation": activation})


def _grad_hidden(
    lists: _Lists,
    grad_y: Tensor,
    down: Tensor,
    through: tuple[Tensor, Tensor] | None,
    scale: Tensor | None,
    dropout: _Dropout,
    lora_dropout: _Dropout,
    activation: str,
    pre: Tensor,
    grad_pre: Tensor | None,
    needs_scale: bool,
    hidden: Tensor | None,
) -> Tensor:
    """Fill `grad_pre` and `hidden` where given; fp32 [parts, capacity], whose sum over parts is the gradient of scale, if needed."""
    depth, ups = down.shape[1], pre.shape[0]
    facts = {"ups": ups, "dropouts": dropout.active + lora_dropout.active, "width": lists.width, "depth": depth}
    sizes, _, _ = lists.tiles(GRAD_HIDDEN, {"BLOCK_N": lists.width}, **facts)
    parts = -(-lists.width // sizes["BLOCK_N"]) if needs_scale else 0
    grad_scale = torch.empty((parts, lists.capacity), dtype=torch.float32, device=pre.device)
    arguments: dict[str, Argument | None] = {"grad_y": grad_y, "grad_y_row": grad_y.stride(0), "down": down, "down_unit": down.stride(0)}
    arguments |= {"down_feature": down.stride(1), "scale": _contiguous(scale), "pre": pre.contiguous(), "grad_pre": grad_pre}
    arguments |= {"grad_scale": grad_scale, "hidden": hidden, **dropout.arguments(), **lora_dropout.arguments("lora_")}
    rank = 0
    if through is not None:
        adapter, grad_low = through
        rank = adapter.shape[0]
        arguments |= {"grad_low": grad_low, "grad_low_row": grad_low.stride(0), "rank": rank}
        arguments |= {"down_A": adapter, "down_A_rank": adapter.stride(0), "down_A_unit": adapter.stride(1)}
    constants: dict[str, Constant] = {
        "UPS": ups,
        "GRAD_PRE": grad_pre is not None,
        "GRAD_SCALE": needs_scale,
        "HIDDEN": hidden is not None,
        "ADAPTED": through is not None,
        "SCALED": scale is not None,
        "DROPOUT": dropout.active,
        "LORA_DROPOUT": lora_dropout.active,
        "DEPTH": depth,
        "BLOCK_R": _rank_lanes([rank]),
    }
    lists.by_rows(GRAD_HIDDEN, lists.width, depth, facts, constants, arguments, {"activation": activation})
    return grad_scale


def _gathered_product(lists: _Lists, inputs: Sequence[Tensor], weights: Sequence[Tensor], dropout: _Dropout | None = None) -> Tensor:
    """[N, columns]: for each token the sum over its entries s of sum_i inputs[i][s] @ weights[i][block of s].

    Args:
        inputs: [capacity, width], contiguous.
        weights: [d_ff, columns], any strides.
        dropout: of the inputs.
    """
    columns = weights[0].shape[1]
    partial = inputs[0].new_empty((lists.capacity, columns))
    arguments: dict[str, Argument | None] = {"out": partial}
    if dropout is not None:
        arguments |= dropout.arguments()
    for i, (a, weight) in enumerate(zip(inputs, weights, strict=True)):
        arguments |= {f"a_{i}": a, f"weight_{i}": weight, f"weight_unit_{i}": weight.stride(0), f"weight_column_{i}": weight.stride(1)}
    constants: dict[str, Constant] = {"INPUTS": len(inputs), "DROPOUT": dropout is not None and dropout.active, "COLUMNS": columns}
    lists.by_rows(PRODUCT, columns, lists.width, {"columns": columns, "depth": lists.width}, constants, arguments)

    out = inputs[0].new_empty((lists.count, columns))
    sizes, warps, stages = lists.tiles(SUM, {"BLOCK_C": columns}, columns=columns)
    shared = {"COLUMNS": columns, "BLOCKS": lists.blocks, "LANES": _power_of_two(lists.blocks)}
    programs = -(-lists.count // sizes["BLOCK_T"]) * -(-columns // sizes["BLOCK_C"])
    given: dict[str, Argument | None] = {
        "partial": partial,
        "counts": lists.index.counts,
        "entries": lists.index.entries,
        "out": out,
        "rows": lists.count,
    }
    _launch(KernelSpec.of(SUM.template, {**sizes, **shared}, None, warps, stages), programs, out.device, given)
    return out


def _outer(lists: _Lists, left: Tensor, right: Tensor, out: Tensor, dropout: _Dropout | None = None) -> Tensor:
    """Fill `out` [d_ff, columns]: for each block the sum over its entries s of left[s]^T right[token of s].

    Args:
        left: [capacity, width], contiguous.
        right: [N, columns], rows contiguous.
        out: any strides.
        dropout: of left.
    """
    columns = right.shape[1]
    limits = {"BLOCK_M": lists.width, "BLOCK_N": columns}
    sizes, warps, stages = lists.tiles(OUTER, limits, columns=columns, width=lists.width)
    constants: dict[str, Constant] = {
        "DROPOUT": dropout is not None and dropout.active,
        "WIDTH": lists.width,
        "COLUMNS": columns,
        "BLOCKS": lists.blocks,
        "PRECISION": product_precision(lists.dtype, lists.tokens.device),
    }
    arguments: dict[str, Argument | None] = {"left": left, "right": right, "right_row": right.stride(0), "out": out}
    arguments |= {"tokens": lists.tokens, "offsets": lists.offsets, "out_unit": out.stride(0), "out_column": out.stride(1)}
    if dropout is not None:
        arguments |= dropout.arguments()
    programs = lists.blocks * -(-lists.width // sizes["BLOCK_M"]) * -(-columns // sizes["BLOCK_N"])
    _launch(KernelSpec.of(OUTER.template, {**sizes, **constants}, None, warps, stages), programs, out.device, arguments)
    return out


def _column_sums(lists: _Lists, rows: Tensor) -> Tensor:
    """[d_ff]: for each block the sum of its entries' rows [capacity, width]."""
    out = rows.new_empty(lists.blocks * lists.width)
    lanes = min(64, _lanes(lists.width))
    constants = {"WIDTH": lists.width, "BLOCKS": lists.blocks, "BLOCK_E": 64, "BLOCK_N": lanes}
    programs = lists.blocks * -(-lists.width // lanes)
    _launch(KernelSpec.of("grouped_sum", constants), programs, out.device, {"rows": rows, "offsets": lists.offsets, "out": out})
    return out


def _launch(spec: KernelSpec, programs: int, device: torch.device, arguments: Mapping[str, Argument | None]) -> None:
    launch(spec, (programs,), device, {name: value for name, value in arguments.items() if value is not None})


def _lists(x: Tensor, tokens: Tensor, offsets: Tensor, hidden: int) -> _Lists:
    return _Lists(tokens.contiguous(), offsets.contiguous(), x.shape[0], hidden // (offsets.shape[0] - 1), x.dtype)


def _check_dtypes(*operands: Tensor) -> None:
    dtypes = {t.dtype for t in operands}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"sptc::routed_ffn on Triton computes in one of bfloat16, float16 and float32; its operands are {names}")


def _row_tiles(capacity: int, blocks: int, size: int) -> int:
    """As many as tiles of `size` entries of one block each can take, whatever the lists; entries of no list count as one more block."""
    return (capacity + (blocks + 1) * (size - 1)) // size if capacity else 0


def _rows(t: Tensor) -> Tensor:
    """`t` [N, C] with contiguous rows; copied only if they are not."""
    return t if t.stride(1) == 1 else t.contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _lanes(size: int) -> int:
    """The smallest tile that holds `size` and that matrix units take."""
    return max(_SMALLEST, _power_of_two(size))


def _rank_lanes(ranks: Sequence[int]) -> int:
    return min(64, _lanes(max(ranks, default=0)))
