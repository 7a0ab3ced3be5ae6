"""What `decline="auto"` decides against what is measured, on 66 shapes: `python -m bench.decisions --json bench/results/decisions.json`.

Each shape is one region, forward and backward: dense under Inductor, and sparse by backend "spt" with `decline="never"`. Both run in turn,
on one thread, in processor time; the ratio is that of the medians. The cost model's figures are those of the report. A decision is wrong
where the two forms differ by over a tenth and the slower one was chosen. Densities are
fixed; at density 1 of attention its kernel competes with the library's. Where a quarter of an FFN's tokens counts, all its units are
computed for these and an eighth for the others; a projection to 32 classes and their loss are in the time of both forms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import sptc
from bench import ffn
from sptc.backend import spt
from sptc.benchmark.machine import facts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEAR = 1.1  # forms whose times differ by less are as good as each other


@dataclass(frozen=True)
class Attention:
    """Causal self-attention of `batch` sequences, given q, k and v [batch, heads, length, size]."""

    batch: int
    length: int
    heads: int
    size: int
    density: float
    dtype: str

    def __str__(self) -> str:
        return f"attention {self.batch} x {self.length}, {self.heads} x {self.size}, keys {self.density:g}, {self.dtype}"

    def options(self) -> dict[str, Any]:
        return {"attention.density": self.density}

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        shape = (self.batch, self.length, self.heads, self.size)
        inputs = (torch.randn(shape, dtype=DTYPES[self.dtype]).transpose(1, 2).requires_grad_() for _ in range(3))
        return _CausalAttention(), tuple(inputs)


@dataclass(frozen=True)
class Units:
    """An FFN with LoRA of rank 16 on frozen weights, given x [tokens, d]; sparse it keeps `density` of its hidden units."""

    tokens: int
    d: int
    hidden: int
    activation: str
    density: float
    dtype: str

    def __str__(self) -> str:
        return f"FFN {self.tokens}, {self.d} to {self.hidden} {self.activation}, units {self.density:g}, {self.dtype}"

    def options(self) -> dict[str, Any]:
        return {"ffn.density": self.density, "ffn.context_density": None}

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        case = ffn.Case(self.tokens, self.d, self.hidden, self.activation, bias=self.activation != "swiglu", lora=16)
        dtype = DTYPES[self.dtype]
        return ffn.Layer(case).to(dtype), (torch.randn(self.tokens, self.d, dtype=dtype, requires_grad=True),)


@dataclass(frozen=True)
class Counted:
    """An FFN as `Units` has it, before a loss in which the labels of a quarter of the tokens count."""

    tokens: int
    d: int
    hidden: int
    activation: str
    dtype: str

    def __str__(self) -> str:
        return f"FFN {self.tokens}, {self.d} to {self.hidden} {self.activation}, a quarter counts, {self.dtype}"

    def options(self) -> dict[str, Any]:
        return {"ffn.density": 1.0, "ffn.context_density": 0.125, "ffn.padding": "compute", "loss.enabled": False}

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        layer, (x,) = Units(self.tokens, self.d, self.hidden, self.activation, 1.0, self.dtype).make()
        labels = torch.randint(_CLASSES, (self.tokens,)).where(torch.rand(self.tokens) < 0.25, -100)
        return _Labelled(layer, nn.Linear(self.d, _CLASSES).to(x.dtype)), (x, labels)


_CLASSES = 32


class _Labelled(nn.Module):
    def __init__(self, layer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, head.requires_grad_(False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.layer(x)), labels)


class _CausalAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


Case = Attention | Units | Counted


def cases() -> Iterator[Case]:
    """24 shapes of attention, 42 of FFNs."""
    for length in (128, 256, 512, 1024, 2048, 4096):
        heads, size = (12, 64) if length in (128, 512, 2048) else (8, 128)
        for density in (1.0, 0.125):
            for dtype in DTYPES:
                yield Attention(max(1, 2048 // length), length, heads, size, density, dtype)
    for tokens in (256, 1024, 4096):
        for d, hidden, activation in ((384, 1536, "gelu"), (768, 2048, "swiglu"), (1024, 4096, "relu")):
            for density in (0.5, 0.25):
                for dtype in DTYPES:
                    yield Units(tokens, d, hidden, activation, density, dtype)
    for dtype in DTYPES:
        yield Units(4096, 2048, 8192, "gelu", 0.5, dtype)
        for d in (1024, 2048):
            yield Counted(4096, d, 4 * d, "gelu", dtype)


@dataclass(frozen=True)
class Result:
    """Milliseconds of forward and backward, measured and predicted."""

    case: Case
    dense: float
    sparse: float
    predicted_dense: float
    predicted_sparse: float

    @property
    def faster(self) -> float:
        return self.dense / self.sparse

    @property
    def predicted(self) -> float:
        return self.predicted_dense / self.predicted_sparse

    @property
    def verdict(self) -> str:
        if 1 / NEAR <= self.faster <= NEAR:
            return "even"
        return "right" if (self.predicted > 1) == (self.faster > 1) else "WRONG"


def measure(case: Case, seconds: float) -> Result:
    """Time one case; `seconds` of measuring, at least three turns."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, inputs = case.make()
    options = {"decline": "never", **case.options()}
    dense, sparse = torch.compile(module, dynamic=False), torch.compile(module, dynamic=False, backend=spt, options=options)
    taken = _turns((_step(module, dense, inputs), _step(module, sparse, inputs)), seconds)
    (region,) = (r for r in sptc.report(sparse).regions if r.status == "rewritten")
    assert region.seconds_dense is not None and region.seconds_sparse is not None
    return Result(case, *(statistics.median(each) * 1e3 for each in taken), 1e3 * region.seconds_dense, 1e3 * region.seconds_sparse)


def _step(module: nn.Module, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    with torch.no_grad():
        grad = torch.randn_like(module(*inputs))

    def run() -> None:
        function(*inputs).backward(grad)
        module.zero_grad(set_to_none=True)
        for x in inputs:
            x.grad = None

    return run


def _turns(runs: tuple[Callable[[], None], ...], seconds: float) -> list[list[float]]:
    for _ in range(2):  # the first compiles
        for run in runs:
            run()
    taken: list[list[float]] = [[] for _ in runs]
    while len(taken[0]) < 3 or sum(map(sum, taken)) < seconds:
        for run, times in zip(runs, taken, strict=True):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decisions", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this, or, after a semicolon, this")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring for each case (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [case for case in cases() if any(part in str(case) for part in arguments.only.split(";"))]
    results = [measure(case, arguments.seconds) for case in tqdm(wanted, disable=None)]
    headers = ("region", "dense ms", "sparse ms", "faster", "predicted", "auto is")
    rows = [(str(r.case), f"{r.dense:.3g}", f"{r.sparse:.3g}", f"{r.faster:.2f}x", f"{r.predicted:.2f}x", r.verdict) for r in results]
    print(tabulate(rows, headers, disable_numparse=True))
    wrong, even = (sum(r.verdict == verdict for r in results) for verdict in ("WRONG", "even"))
    print(f"{len(results)} regions: {wrong} decided wrong, {even} even")
    if arguments.json:
        found = [{"kind": type(r.case).__name__, **asdict(r), "faster": r.faster, "predicted": r.predicted} for r in results]
        arguments.json.write_text(json.dumps({"machine": facts(torch.device("cpu")), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
