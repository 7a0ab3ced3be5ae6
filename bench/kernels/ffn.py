"""Times of the routed FFN beside the dense one, both compiled by Inductor, and of its grouped products beside cuBLAS."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import steps
from bench.kernels.cases import ACTIVATIONS, FfnCase, FfnOperands, ffn_operands
from bench.kernels.clock import Call, Timing, alternating, milliseconds
from sptc.codegen.launch import recorded
from sptc.codegen.load import load
from sptc.codegen.spec import KernelSpec

_TOKENS = 16 * 512

CASES = (
    FfnCase("OPT-like 2048", _TOKENS, 2048, 8192, "relu(u0)", bias=True, lora=16),
    FfnCase("LLaMA-like 4096", _TOKENS, 4096, 11008, "u1*silu(u0)", bias=False, lora=16),
    FfnCase("OPT-like 2048, no LoRA", _TOKENS, 2048, 8192, "relu(u0)", bias=True, scaled=False),
    FfnCase("OPT-like 2048, all weights", _TOKENS, 2048, 8192, "relu(u0)", bias=True, weights_train=True),
    FfnCase("OPT-like 1024", _TOKENS, 1024, 4096, "relu(u0)", bias=True, lora=16),
    FfnCase("OPT-like 2560", _TOKENS, 2560, 10240, "relu(u0)", bias=True, lora=16),
    FfnCase("LLaMA-like 2560", _TOKENS, 2560, 6912, "u1*silu(u0)", bias=False, lora=16),
)


class Model:
    """Both forms of one FFN on the same weights and adapters, with what trains of them in `leaves`."""

    def __init__(self, case: FfnCase, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.o = case, ffn_operands(case, device, dtype)
        # What is compiled below reads plain values only: Dynamo would trace into the parser of activations.
        self.text, self.active, self.function = case.text, case.active, ACTIVATIONS[case.activation]
        self.biased, self.adapted = list(range(len(self.o.up_bias))), list(range(len(self.o.low)))
        o, d, rank = self.o, case.d, case.lora
        self.router = torch.randn(case.blocks, d, device=device, dtype=dtype) * d**-0.5
        self.up_A = [torch.randn(rank, d, device=device, dtype=dtype) * d**-0.5 for _ in o.low]
        self.down_B = torch.randn(d, rank, device=device, dtype=dtype) * 0.1 if rank else None
        adapters = [*self.up_A, *o.up_B, o.down_A, self.down_B] if rank else []
        weights = [*o.up, *o.up_bias, o.down] if case.weights_train else []
        self.leaves = [t.requires_grad_() for t in (o.x, *adapters, *weights) if t is not None]
        if case.scaled:
            self.router.requires_grad_()

    def dense(self) -> Tensor:
        """y [N, d]."""
        o = self.o
        us = [F.linear(o.x, up, o.up_bias[i] if o.up_bias else None) for i, up in enumerate(o.up)]
        for i, a in enumerate(self.up_A):
            us[i] = us[i] + F.linear(F.linear(o.x, a), o.up_B[i])
        hidden = self.function(*us)
        return self._with_adapter(hidden @ o.down, F.linear(hidden, o.down_A) if o.down_A is not None else None)

    def routed(self) -> Tensor:
        """y [N, d], router and lists included."""
        o = self.o
        scores = torch.sigmoid(F.linear(o.x, self.router).float())
        tokens, offsets, index = steps.ops.route(scores, self.active)
        scale = 2 * scores.reshape(-1).index_select(0, index) if self.router.requires_grad else None
        low = [F.linear(o.x, a) for a in self.up_A]
        weights = (o.up, o.up_bias, self.biased, low, o.up_B, self.adapted, o.down, o.down_A)
        y, low_out, _ = steps.ops.routed_ffn(o.x, *weights, tokens, offsets, scale, None, None, 0.0, 0.0, self.text)
        return self._with_adapter(y, low_out)

    def trained(self, routed: bool) -> list[Tensor]:
        return [*self.leaves, self.router] if routed and self.case.scaled else self.leaves

    def _with_adapter(self, y: Tensor, low_out: Tensor | None) -> Tensor:
        return y if self.down_B is None or low_out is None else y + F.linear(low_out, self.down_B)


def measure(case: FfnCase, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Timing]:
    """Forward, and forward with backward, of both ways."""
    model = Model(case, device, dtype)
    compiled = torch.compile if device.type == "cuda" else _as_it_is
    ways = {"dense": compiled(model.dense), "routed": compiled(model.routed)}
    calls: dict[str, Call] = {}
    for name, way in ways.items():
        leaves = model.trained(name == "routed")
        calls[f"{name} forward"] = way
        calls[f"{name} forward+backward"] = lambda way=way, leaves=leaves: torch.autograd.grad(way(), leaves, model.o.grad_y)  # type: ignore[misc]
    return alternating(calls, rounds, device)


def rows(case: FfnCase, times: dict[str, Timing]) -> list[dict[str, Any]]:
    """Table rows: milliseconds of both ways, and how many times faster the routed one is."""
    return [
        {
            "case": case.name,
            "part": part,
            "dense ms": times[f"dense {part}"].ms,
            "routed ms": times[f"routed {part}"].ms,
            "over dense": times[f"dense {part}"].ms / times[f"routed {part}"].ms,
            "host ms": times[f"routed {part}"].host_ms,
            "dense MiB": times[f"dense {part}"].peak_mib,
            "routed MiB": times[f"routed {part}"].peak_mib,
        }
        for part in ("forward", "forward+backward")
    ]


def measure_products(case: FfnCase, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Every grouped product of forward and backward alone, beside one cuBLAS product over all list entries."""
    o: FfnOperands = ffn_operands(case, device, dtype)
    with recorded(run=True) as launches:
        steps.ffn_step(case, o)
    entries, width = case.tokens * case.active, case.hidden // case.blocks
    a, b = torch.randn(entries, case.d, device=device, dtype=dtype), torch.randn(case.d, width, device=device, dtype=dtype)
    dense = 2 * entries * width * case.d / milliseconds(lambda: torch.mm(a, b), device, rounds) / 1e9
    found = []
    for launch in launches:
        operations = 2 * entries * width * features(launch.spec)
        if not operations:  # no product; it may not be one that can run twice on the same memory, either
            continue
        kernel = load(launch.spec, interpret=device.type == "cpu")
        ms = milliseconds(functools.partial(kernel.launch, launch.grid, launch.arguments, device), device, rounds)
        rate = operations / ms / 1e9
        found.append(
            {
                "case": case.name,
                "kernel": launch.spec.template,
                "features": features(launch.spec),
                "ms": ms,
                "TFLOP/s": rate,
                "torch.mm TFLOP/s": dense,
                "share": rate / dense,
            }
        )
    return found


def features(spec: KernelSpec) -> int:
    """How many features a kernel multiplies each (list entry, hidden unit) with; 0 if it is no product."""
    constants: dict[str, Any] = dict(spec.constants)
    match spec.template:
        case "ffn_up":
            return constants["DEPTH"] * constants["UPS"]
        case "ffn_grad_hidden":
            return constants["DEPTH"]
        case "grouped_product":
            return constants["COLUMNS"] * constants["INPUTS"]
        case "grouped_outer":
            return constants["COLUMNS"]
    return 0


def small() -> FfnCase:
    """A case of the same kind for a machine without a GPU."""
    return replace(CASES[0], name="small", tokens=24, d=32, hidden=64, lora=4, blocks=4, active=2)


def _as_it_is(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return function
