"""Sparse attention against `scaled_dot_product_attention` on this CPU: `python -m bench.attention [--json bench/results/attention.json]`.

Forward and backward, selection and codebook statistics included, in one process. Both sides run in turn, so that a change of load meets
both; figures are medians of the rounds, the ratio that of the medians. `--threads 1` counts CPU time, which a busy machine leaves alone.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

import sptc.codegen.ops  # noqa: F401
from sptc.codegen.cpu.attention import default_blocks


@dataclass(frozen=True)
class Case:
    """Self-attention of `batch` sequences.

    `mask` is "causal", "none", "padding" (of a quarter of all keys), or "stored": causal, as the tensor that a mask which was not read is.
    """

    name: str
    batch: int
    length: int
    heads: int
    size: int
    mask: str
    density: float = 1 / 8
    dtype: str = "float32"


CASES = (
    Case("causal 512", 8, 512, 12, 64, "causal"),
    Case("causal 1024", 4, 1024, 12, 64, "causal"),
    Case("causal 2048", 2, 2048, 12, 64, "causal"),
    Case("causal 4096", 1, 4096, 12, 64, "causal"),
    Case("causal 8192", 1, 8192, 12, 64, "causal"),
    Case("stored 2048", 2, 2048, 12, 64, "stored"),
    Case("stored 8192", 1, 8192, 12, 64, "stored"),
    Case("full 1024", 4, 1024, 12, 64, "none"),
    Case("full 4096", 1, 4096, 12, 64, "none"),
    Case("BERT-like 512", 8, 512, 12, 32, "padding"),
    *(Case(f"256 keys of {n}", 1, n, 12, 64, "causal", 256 / n) for n in (2048, 4096, 8192, 16384)),
)


@dataclass(frozen=True)
class Result:
    case: Case
    selector: str
    query_block: int
    key_block: int
    dense_ms: float
    sparse_ms: float
    select_ms: float

    @property
    def ratio(self) -> float:
        return self.dense_ms / self.sparse_ms


def run(case: Case, selector: str, blocks: tuple[int, int] | None, rounds: int) -> Result:
    """Time one case. Blocks are those the CPU code recommends unless given."""
    torch.manual_seed(0)
    b, n, h, d = case.batch, case.length, case.heads, case.size
    dtype, causal = getattr(torch, case.dtype), case.mask in ("causal", "stored")
    q, k, v = (torch.randn(b, n, h, d, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = torch.randn(b, n, h, d, dtype=dtype).transpose(1, 2)
    codebooks = torch.randn(h, d // 8, 16, 8)
    padding = torch.arange(n) < torch.linspace(n // 2, n, b).long().unsqueeze(1)
    allowed = padding[:, None, None].expand(b, 1, n, n)
    query_block, key_block = blocks or default_blocks(n, n, case.density, own=causal)
    predicate = {"causal": "k <= q", "padding": "t0[b, k]"}.get(case.mask, "True")
    stored = torch.ones(n, n, dtype=torch.bool).tril() if case.mask == "stored" else None
    spec = (predicate, [padding] if case.mask == "padding" else [], [], stored, None)

    def dense() -> None:
        mask = allowed if case.mask == "padding" else None
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal), (q, k, v), grad)

    def select() -> tuple[Tensor, Tensor]:
        books = codebooks if selector == "pq" else None
        rest = (selector, case.density, d**-0.5, query_block, key_block, causal, books is not None)
        return torch.ops.sptc.select_blocks(q.detach(), k.detach(), books, *spec, *rest)[:2]

    def sparse() -> None:
        out, _ = torch.ops.sptc.sparse_attention(q, k, v, *select(), *spec, None, 0.0, d**-0.5, query_block, key_block, "u0", None)
        torch.autograd.grad(out, (q, k, v), grad)

    dense_ms, sparse_ms, select_ms = _medians((dense, sparse, lambda: select() and None), rounds)
    return Result(case, selector, query_block, key_block, dense_ms, sparse_ms, select_ms)


def _medians(functions: tuple[Callable[[], None], ...], rounds: int) -> list[float]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            start = clock()
            function()
            if turn:  # the first turn warms up
                taken.append((clock() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def exponent(results: Sequence[Result]) -> float:
    """Of the length in the time that sparse attention takes, by least squares of the logarithms."""
    logs = [(math.log(r.case.length), math.log(r.sparse_ms)) for r in results]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--selector", choices=("pq", "pooled"), default="pooled")
    parser.add_argument("--blocks", help="T,B instead of the recommended ones; several separated by spaces")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    choices = [tuple(map(int, pair.split(","))) for pair in options.blocks.split()] if options.blocks else [None]
    cases = [Case(**{**asdict(case), "dtype": options.dtype}) for case in CASES if options.only in case.name]
    results = [run(case, options.selector, blocks, options.rounds) for case in cases for blocks in choices]
    rows = [
        (
            r.case.name,
            f"{r.query_block} x {r.key_block}",
            round(r.dense_ms, 1),
            round(r.sparse_ms, 1),
            round(r.select_ms, 1),
            f"{r.ratio:.2f}x",
        )
        for r in results
    ]
    print(tabulate(rows, ["case", "tile x block", "SDPA ms", "sparse ms", "of it selection ms", "ratio"]))
    fixed = [r for r in results if r.case.name.startswith("256 keys")]
    if len(fixed) > 1:
        print(f"256 keys a query: time grows with the length to the power of {exponent(fixed):.2f}")
    if options.json:
        machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        options.json.write_text(
            json.dumps({"machine": machine, "results": [{**asdict(r), "ratio": r.ratio} for r in results]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
