"""Selection of key blocks on a GPU: the kernels behind `sptc::select_blocks`.

pq: codeword histograms of tiles and blocks, whose products count agreements. pooled: two passes of mean queries over the keys. Then the
best allowed blocks of each tile. Nothing waits for the device.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sptc.codegen.reference.block_lists import block_count, list_width, query_run, statistics_stride
from sptc.codegen.triton.launchers.mask import KernelMask
from sptc.codegen.triton.launchers.precision import full_precision, product_precision
from sptc.codegen.triton.launchers.selection_tiles import ENCODE, LOGSUMEXP, MEANS, PAIRS, SCORES, STATISTICS, VISIBLE
from sptc.codegen.triton.launchers.sizes import SMALLEST, padded, side, strided
from sptc.codegen.triton.run.launch import Argument, launch
from sptc.codegen.triton.spec import Constant, KernelSpec
from sptc.codegen.triton.target import target_of
from sptc.ir.predicate import parse

_LONGEST_CHUNK = 4096  # blocks that a program ranks at a time: 64-bit keys of more would not stay in registers


@dataclass(frozen=True)
class _Rows:
    """Per (batch row, key head) data in which an axis of size 1 stands for all: bool [1 or b, 1 or h_kv, ...], contiguous."""

    name: str
    values: Tensor

    def arguments(self) -> dict[str, Argument]:
        axes = zip("bh", self.values.shape, self.values.stride(), strict=False)
        strides = {f"{self.name}_stride_{axis}": 0 if size == 1 else stride for axis, size, stride in axes}
        return {f"{self.name}_ptr": self.values, **strides}


def default_blocks(n: int, m: int, density: float, own: bool = False) -> tuple[int, int]:
    """(query_block, key_block) for n queries and m keys on a GPU.

    128 queries and 64 keys fill the matrix units of every architecture. Shorter sequences, and tiles that own blocks, get smaller ones, so
    that the blocks a tile owns are at most half of the keys it keeps; but not below 16, the least that a matrix product takes.
    """
    kept = max(1, math.ceil(density * m))
    key_block = min(64, max(SMALLEST, _power_of_two_within(kept // 4)))
    query_block = min(128, max(SMALLEST, _power_of_two_within(kept // 2 if own else kept)))
    return min(query_block, max(n, 1)), min(key_block, max(m, 1))


def select_blocks(
    q: Tensor, k: Tensor, codebooks: Tensor | None, mask: KernelMask, selector: str, density: float, scale: float, query_block: int,
    key_block: int, own: bool, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ids, counts, code_sums and code_counts of `sptc::select_blocks`. Scores are computed in fp32; on meta and fake tensors nothing runs.

    Raises:
        TypeError: q or k is neither bf16, fp16 nor fp32.
    """
    for name, x in (("q", q), ("k", k)):
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"sptc::select_blocks: {name} is {x.dtype}; kernels take bfloat16, float16 and float32")
    (b, h, n, d), (h_kv, m) = q.shape, k.shape[1:3]
    sizes = _Sizes(b, h, n, d, h_kv, m, query_block, key_block, q.device)
    visible = _visible_keys(mask, sizes)
    pairs = _allowed_pairs(mask, sizes)
    sums, code_counts = (torch.empty(0, dtype=torch.float32, device=q.device) for _ in range(2))
    if selector == "pq":
        assert codebooks is not None
        words = codebooks.float().contiguous()
        queries = _histograms(q, words, None, query_block, sizes)
        keys = _histograms(k, words, visible, key_block, sizes)
        # Counts are exact in fp32, and in TF32 up to 2048 a tile: sums of their products are exact below 2^24.
        scores = torch.matmul(queries, keys.mT)
        if statistics:
            sums, code_counts = _statistics(q, k, words, visible, sizes)
    else:
        scores = _pooled(q, k, visible, pairs, scale, sizes)
    width = int(list_width(sizes.n, sizes.m, density, query_block, key_block, own))
    return *_choose(scores, pairs, width, own and query_block > 1, sizes), sums, code_counts


@dataclass(frozen=True)
class _Sizes:
    b: int
    h: int
    n: int
    d: int
    h_kv: int
    m: int
    query_block: int
    key_block: int
    device: torch.device

    @property
    def group(self) -> int:
        return self.h // self.h_kv

    @property
    def tiles(self) -> int:
        return block_count(self.n, self.query_block)

    @property
    def blocks(self) -> int:
        return block_count(self.m, self.key_block)

    def arguments(self) -> dict[str, Argument]:
        """The sizes as kernels call them."""
        return {"queries": self.n, "keys": self.m, "tiles": self.tiles, "blocks": self.blocks}

    def mask_rows(self, mask: KernelMask, predicate: str) -> tuple[int, int, int]:
        """Batch rows and key heads between which `predicate` and the tensor operands differ (1 or all), and heads of a group to look at."""
        operands = [x for x in (mask.boolean, mask.bias) if x is not None]
        by_batch = parse(predicate).uses("b") or any(x.dim() > 3 and x.shape[-4] > 1 for x in operands)
        by_head = parse(predicate).uses("h") or any(x.dim() > 2 and x.shape[-3] > 1 for x in operands)
        return self.b if by_batch else 1, self.h_kv if by_head else 1, self.group if by_head else 1


def _visible_keys(mask: KernelMask, sizes: _Sizes) -> _Rows | None:
    """bool [1 or b, 1 or h_kv, m]: keys that no operand, looked at alone, hides from every query. None if there is none that could."""
    conjuncts = [c for c in mask.parsed.conjuncts if not c.uses("q")]
    operands = [_first_row_if_alike(x) for x in (mask.boolean, mask.bias) if x is not None]
    if not conjuncts and not operands:
        return None
    predicate = str(parse(" & ".join(f"({c})" for c in conjuncts) or "True"))
    shown = [x if x.dtype == torch.bool else x > torch.finfo(x.dtype).min for x in operands]
    boolean = functools.reduce(operator.and_, (x.any(-2, keepdim=True) for x in shown)) if shown else None
    keys = replace(mask, predicate=predicate, boolean=boolean, bias=None)
    rows, heads, group = sizes.mask_rows(keys, predicate)
    visible = torch.empty((rows, heads, sizes.m), dtype=torch.bool, device=sizes.device)
    tiling = VISIBLE.choose(target_of(sizes.device)).values()
    _launch(
        "visible_keys",
        {**_of_mask(keys, "PREDICATE", "MASK", "TENSORS", "STRIDES", "SIZES"), "GROUP": group},
        tiling,
        (block_count(sizes.m, tiling["KEYS"]), heads, rows),
        sizes.device,
        {"visible_ptr": visible, **sizes.arguments(), **keys.arguments()},
        keys.hooks(),
    )
    return _Rows("visible", visible)


def _allowed_pairs(mask: KernelMask, sizes: _Sizes) -> _Rows:
    """bool [1 or b, 1 or h_kv, tiles, blocks]: some head of the group allows some element of the pair."""
    rows, heads, group = sizes.mask_rows(mask, mask.predicate)
    pairs = torch.empty((rows, heads, sizes.tiles, sizes.blocks), dtype=torch.bool, device=sizes.device)
    tiling = PAIRS.choose(target_of(sizes.device)).values()
    runs = {
        "TILE_ROWS": min(padded(sizes.query_block), tiling["ROWS"]),
        "BLOCK_COLUMNS": min(padded(sizes.key_block), tiling["COLUMNS"]),
    }
    tile_groups = block_count(sizes.tiles, tiling["ROWS"] // runs["TILE_ROWS"])
    block_groups = block_count(sizes.blocks, tiling["COLUMNS"] // runs["BLOCK_COLUMNS"])
    _launch(
        "allowed_pairs",
        {
            **_of_mask(mask, "PREDICATE", "BY_RANGE", "READS_TENSORS", "MASK", "BIAS", "BIAS_LEAST", "TENSORS", "STRIDES", "SIZES"),
            **runs,
            "GROUP": group,
            "QUERY_BLOCK": sizes.query_block,
            "KEY_BLOCK": sizes.key_block,
        },
        tiling,
        (tile_groups * block_groups, heads, rows),
        sizes.device,
        {"pairs_ptr": pairs, **sizes.arguments(), **mask.arguments()},
        mask.hooks(),
    )
    return _Rows("pairs", pairs)


def _histograms(x: Tensor, words: Tensor, visible: _Rows | None, step: int, sizes: _Sizes) -> Tensor:
    """fp32 [b, h_kv, runs, M * E] of x [b, h or h_kv, length, d]: codewords of the vectors of each run of `step`, over a group's heads."""
    _, subspaces, codewords, _ = words.shape
    length = x.shape[2]
    runs = block_count(length, step)
    histogram = torch.empty((sizes.b, sizes.h_kv, runs, subspaces * codewords), dtype=torch.float32, device=x.device)
    facts = _of_words(words)
    tiling = ENCODE.choose(target_of(x.device), **facts).values()
    run_rows = min(padded(step), tiling["ROWS"])
    constants = {"STEP": step, "RUN_ROWS": run_rows, **_of_codes(words, visible, x.shape[1] // sizes.h_kv)}
    arguments = {**strided("x", x, "bhnd"), "words_ptr": words, "histogram_ptr": histogram, "length": length, "runs": runs}
    arguments |= {} if visible is None else visible.arguments()
    grid = (block_count(runs, tiling["ROWS"] // run_rows), sizes.h_kv, sizes.b)
    _launch("encode_histogram", constants, tiling, grid, x.device, arguments)
    return histogram


def _statistics(q: Tensor, k: Tensor, words: Tensor, visible: _Rows | None, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """code_sums fp32 [h_kv, M, E, d / M] and code_counts fp32 [h_kv, M, E]."""
    h_kv, subspaces, *_ = words.shape
    sums, counts = torch.empty_like(words), torch.empty(words.shape[:3], dtype=torch.float32, device=q.device)
    facts = _of_words(words)
    q_step, k_step = statistics_stride(sizes.b, sizes.n), statistics_stride(sizes.b, sizes.m)
    _launch(
        "code_statistics",
        _of_codes(words, visible, sizes.group),
        STATISTICS.choose(target_of(q.device), **facts).values(),
        (subspaces, h_kv, 1),
        q.device,
        {
            **strided("q", q, "bhnd"),
            **strided("k", k, "bhnd"),
            "words_ptr": words,
            "sums_ptr": sums,
            "counts_ptr": counts,
            "batches": sizes.b,
            "q_samples": block_count(sizes.n, q_step),
            "q_step": q_step,
            "k_samples": block_count(sizes.m, k_step),
            "k_step": k_step,
            **({} if visible is None else visible.arguments()),
        },
    )
    return sums, counts


def _pooled(q: Tensor, k: Tensor, visible: _Rows | None, pairs: _Rows, scale: float, sizes: _Sizes) -> Tensor:
    """fp32 [b, h_kv, tiles, blocks]: softmax of the means of runs of queries against visible keys, summed over runs, group and keys."""
    target, size, width, run = target_of(q.device), sizes.d, side(sizes.d), query_run(sizes.query_block)
    facts = {"WIDTH": width, "itemsize": k.element_size()}
    runs, run_rows = block_count(sizes.n, run), padded(run)
    means = torch.empty((sizes.b, sizes.h, runs, size), dtype=k.dtype, device=q.device)
    tiling = MEANS.choose(target, **facts).values()
    _launch(
        "run_means",
        {"RUN": run, "RUN_ROWS": run_rows, "SIZE": size, "WIDTH": width},
        tiling,
        (block_count(runs, tiling["ROWS"] // run_rows), sizes.h, sizes.b),
        q.device,
        {**strided("q", q, "bhnd"), "means_ptr": means, "runs": runs, **sizes.arguments()},
    )
    lse = torch.empty((sizes.b, sizes.h, runs), dtype=torch.float32, device=q.device)
    runs_per_tile = sizes.query_block // run
    constants: dict[str, Constant] = {
        "RUNS_PER_TILE": runs_per_tile,
        "KEY_BLOCK": sizes.key_block,
        "GROUP": sizes.group,
        "SIZE": size,
        "WIDTH": width,
        "VISIBLE": visible is not None,
        "PRECISION": product_precision(k.dtype, k.device),
    }
    arguments = {
        "means_ptr": means,
        **strided("k", k, "bhnd"),
        **({} if visible is None else visible.arguments()),
        **pairs.arguments(),
        "lse_ptr": lse,
        "runs": runs,
        **sizes.arguments(),
        "scale_log2": scale * math.log2(math.e),
    }
    tiling = LOGSUMEXP.choose(target, **facts).values()
    _launch("pooled_logsumexp", constants, tiling, (block_count(runs, tiling["ROWS"]), sizes.h, sizes.b), q.device, arguments)
    scores = torch.empty((sizes.b, sizes.h_kv, sizes.tiles, sizes.blocks), dtype=torch.float32, device=q.device)
    tiling = SCORES.choose(target, **facts).values()
    tile_rows, block_columns = min(padded(runs_per_tile), tiling["ROWS"]), min(padded(sizes.key_block), tiling["COLUMNS"])
    tile_groups = block_count(sizes.tiles, tiling["ROWS"] // tile_rows)
    block_groups = block_count(sizes.blocks, tiling["COLUMNS"] // block_columns)
    _launch(
        "pooled_scores",
        {**constants, "TILE_ROWS": tile_rows, "BLOCK_COLUMNS": block_columns},
        tiling,
        (tile_groups * block_groups, sizes.h_kv, sizes.b),
        q.device,
        {**arguments, "scores_ptr": scores},
    )
    return scores


def _choose(scores: Tensor, pairs: _Rows, width: int, own: bool, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """ids int32 [b, h_kv, tiles, width] and counts int32 [b, h_kv, tiles]."""
    lists = (sizes.b, sizes.h_kv, sizes.tiles)
    ids = torch.empty((*lists, width), dtype=torch.int32, device=sizes.device)
    counts = torch.empty(lists, dtype=torch.int32, device=sizes.device)
    chunk = min(max(padded(sizes.blocks), SMALLEST), _LONGEST_CHUNK)
    farthest = 4 * (sizes.n + sizes.m) + 2 * (sizes.query_block + sizes.key_block) + 1
    _launch(
        "choose_blocks",
        {
            "QUERY_BLOCK": sizes.query_block,
            "KEY_BLOCK": sizes.key_block,
            "OWN": own,
            "NEAR_BITS": farthest.bit_length(),
            "CHUNK": chunk,
            "SINGLE": sizes.blocks <= chunk,
        },
        {"num_warps": 1 if chunk <= 256 else 4, "num_stages": 1},
        (sizes.tiles, sizes.h_kv, sizes.b),
        sizes.device,
        {"scores_ptr": scores, **pairs.arguments(), "ids_ptr": ids, "counts_ptr": counts, **sizes.arguments(), "width": width},
    )
    return ids, counts


def _launch(
    template: str, constants: dict[str, Constant], tiling: dict[str, int], grid: tuple[int, ...], device: torch.device,
    arguments: dict[str, Argument], hooks: dict[str, str] | None = None,
) -> None:  # fmt: skip
    tiles = {name: value for name, value in tiling.items() if name not in ("num_warps", "num_stages")}
    spec = KernelSpec.of(template, {**constants, **tiles}, hooks, tiling["num_warps"], tiling["num_stages"])
    launch(spec, grid, device, arguments)


def _of_words(words: Tensor) -> dict[str, int]:
    return {"WORDS": side(words.shape[2]), "WIDTH": side(words.shape[3])}


def _of_codes(words: Tensor, visible: _Rows | None, group: int) -> dict[str, Constant]:
    """Constants of the kernels that look for the nearest of the codewords [h_kv, M, E, d / M]."""
    sizes = dict(zip(("SUBSPACES", "CODEWORDS", "SIZE"), words.shape[1:], strict=True))
    precision = full_precision(words.device)  # codewords differ by little
    return {**_of_words(words), **sizes, "GROUP": group, "VISIBLE": visible is not None, "PRECISION": precision}


def _of_mask(mask: KernelMask, *names: str) -> dict[str, Constant]:
    """Those of a mask's constants that a template declares."""
    constants = mask.constants()
    return {name: constants[name] for name in names}


def _first_row_if_alike(x: Tensor) -> Tensor:
    """An operand without the copies of its row along queries that broadcasting made."""
    return x[..., :1, :] if x.dim() > 1 and x.stride(-2) == 0 else x if x.dim() > 1 else x.view(1, -1)


def _power_of_two_within(size: int) -> int:
    return 1 << max(0, size.bit_length() - 1)
