"""The routed FFN against the dense one, forward and backward: `python -m bench.ffn [--case NAME] [--rounds N] [--threads N] [--clock cpu]`.

Each round times dense eager, dense compiled by Inductor, and dense compiled by backend "spt" with `ffn.selector="router"` (router, choice
and products, compiled by Inductor) one after the other, in one process, so that a busy machine hurts all of them alike. Ratios are of
medians and of minima over the rounds.

`Ffn.units` and `Ffn.counted` are another form in plain torch, which `make gpu` times: one set of hidden units for all tokens.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sptc
from sptc.backend import compile_graph, spt
from sptc.config import Config

ACTIVATIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "relu": (1, F.relu),
    "gelu": (1, F.gelu),
    "swiglu": (2, lambda u, v: F.silu(u) * v),
}
"""How many up projections an activation reads, and the function of their outputs."""


@dataclass(frozen=True)
class Case:
    """One FFN. `lora` is the rank of trainable adapters on all projections, 0 for none; `trained`: routed it has what `sptc.prepare` adds,
    a router that learns and scales, and a stand-in for the blocks that are left out."""

    tokens: int
    d: int
    hidden: int
    activation: str = "gelu"
    bias: bool = True
    lora: int = 0
    trained: bool = False
    blocks: int = 16


CASES = {
    "frozen-1024": Case(4096, 1024, 4096),
    "frozen-2048": Case(2048, 2048, 8192),
    "lora-384": Case(4096, 384, 1536, lora=16),
    "lora-384-router": Case(4096, 384, 1536, lora=16, trained=True),
    "lora-768-router": Case(4096, 768, 3072, lora=16, trained=True),
    "lora-1024-router": Case(4096, 1024, 4096, lora=16, trained=True),
    "swiglu-1024-router": Case(2048, 1024, 2816, "swiglu", bias=False, lora=16, trained=True),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Adapter(nn.Module):
    """LoRA on a frozen linear layer."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, inputs) * 0.02)
        self.b = nn.Parameter(torch.randn(outputs, rank) * 0.02)


class Ffn(nn.Module):
    """x [N, d] to y [N, d]: frozen weights and their adapters."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        ups, self.function = ACTIVATIONS[case.activation]
        self.ups = nn.ModuleList(nn.Linear(case.d, case.hidden, case.bias) for _ in range(ups)).requires_grad_(False)
        self.down = nn.Linear(case.hidden, case.d, case.bias).requires_grad_(False)
        rank = case.lora
        self.up_adapters = nn.ModuleList(Adapter(case.d, case.hidden, rank) for _ in self.ups) if rank else []
        self.down_adapter = Adapter(case.hidden, case.d, rank) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)

    def dense(self, x: Tensor, units: Tensor | None = None) -> Tensor:
        """y of all hidden units, or of `units` (their numbers)."""

        def part(weight: Tensor, axis: int = 0) -> Tensor:
            return weight if units is None else weight.index_select(axis, units)

        hidden = self._hidden(x, part)
        y = F.linear(hidden, part(self.down.weight, 1), self.down.bias)
        adapter = self.down_adapter
        return y if adapter is None else y + F.linear(F.linear(hidden, part(adapter.a, 1)), adapter.b)

    def units(self, x: Tensor, density: float) -> Tensor:
        """y of the hidden units that put most mean energy into it, told from every 16th token: one set for all tokens."""
        return self.dense(x, self._greatest(x, density))

    def counted(self, x: Tensor, counted: float, density: float) -> Tensor:
        """As where the labels of the first tokens, a share `counted`, count in the loss: all units for them, `units` for the others."""
        first = int(len(x) * counted)
        return torch.cat([self.dense(x[:first]), self.dense(x[first:], self._greatest(x, density))])

    def _hidden(self, x: Tensor, part: Callable[[Tensor], Tensor] = lambda weight: weight) -> Tensor:
        us = [F.linear(x, part(up.weight), None if up.bias is None else part(up.bias)) for up in self.ups]
        for i, adapter in enumerate(self.up_adapters):
            us[i] = us[i] + F.linear(F.linear(x, adapter.a), part(adapter.b))
        return self.function(*us)

    @torch.no_grad()
    def _greatest(self, x: Tensor, density: float) -> Tensor:
        energy = self._hidden(x[::16]).float().square().mean(0) * self.down.weight.float().square().sum(0)
        return energy.topk(int(self.case.hidden * density)).indices


class Layer(nn.Module):
    """A module around an FFN: what `sptc.prepare` adds belongs to a module whose hooks Dynamo traces."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.ffn = Ffn(case)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


def routed(layer: Layer, x: Tensor, inner: Callable[..., Any] | None = None) -> Callable[[Tensor], Tensor]:
    """The layer compiled by backend "spt" at a density of 1/2, by `inner` in place of Inductor if given; prepared if its case says so."""
    case = layer.ffn.case
    options = {"decline": "never", "ffn.selector": "router", "ffn.density": 0.5, "ffn.blocks": case.blocks}
    if case.trained:
        sptc.prepare(layer, x, options)
    if inner is None:
        return torch.compile(layer, dynamic=False, backend=spt, options=options)
    config = Config.from_options(options)
    backend = functools.partial(compile_graph, config=config, inner=lambda gm, inputs, _: inner(gm, inputs))
    return torch.compile(layer, dynamic=False, backend=backend)


def measure(case: Case, dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of forward and backward by `clock`, by variant, one entry a round."""
    torch.manual_seed(0)
    layer = Layer(case).to(dtype)
    x = torch.randn(case.tokens, case.d, dtype=dtype, requires_grad=True)
    grad = torch.randn(case.tokens, case.d, dtype=dtype)
    functions = {"eager": layer.ffn.dense, "inductor": torch.compile(layer.ffn.dense), "routed": routed(layer, x.detach())}

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            function(x).backward(grad)
            x.grad = None
            layer.zero_grad(set_to_none=True)

        return run

    steps = {name: step(function) for name, function in functions.items()}
    for _ in range(3):
        for run in steps.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, with --threads 1 on a busy machine")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{'case':20}{'eager ms':>10}{'inductor':>10}{'routed':>10}{'x eager':>9}{'x inductor':>12}{'(of minima)':>13}")
    for name in arguments.case or CASES:
        times = measure(CASES[name], DTYPES[arguments.dtype], arguments.rounds, clock)
        eager, inductor, routed = (statistics.median(times[k]) * 1e3 for k in ("eager", "inductor", "routed"))
        least = min(times["inductor"]) / min(times["routed"])
        print(
            f"{name:20}{eager:10.1f}{inductor:10.1f}{routed:10.1f}{eager / routed:9.2f}{inductor / routed:12.2f}{least:13.2f}", flush=True
        )


if __name__ == "__main__":
    main()
