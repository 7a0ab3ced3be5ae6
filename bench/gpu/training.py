"""Whole LoRA steps of a LLaMA-shaped model: forward, backward and AdamW, by Inductor and by backend "spt"."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import sptc
from bench.gpu.journal import Figures
from bench.gpu.sizes import RANK, Sizes
from bench.gpu.stage import Limit
from bench.gpu.timing import one
from sptc.backend import compile_graph, spt
from sptc.codegen.cpu.attention import default_blocks
from sptc.codegen.triton.launchers.selection import default_blocks as kernel_blocks
from sptc.config import Config
from sptc.device.costs import calibrate

_COUNTED = 4  # one of so many tokens has a label: a question with its answer


@dataclass(frozen=True)
class Way:
    """How a step is compiled: by Inductor if `options` is None, else by backend "spt" with them."""

    name: str
    options: Mapping[str, Any] | None = None
    graphs: bool = False


# Densities are given: those that would be measured on random weights say nothing.
CONTEXT = {"attention.density": 0.125, "ffn.density": 1.0, "ffn.context_density": 0.25}
HALF = {"attention.density": 0.125, "ffn.density": 0.5, "ffn.context_density": None}
NEVER, AUTO = {"decline": "never"}, {"decline": "auto"}

WAYS = (
    Way("Inductor"),
    Way("spt never, context 1/4", {**NEVER, **CONTEXT}),
    Way("spt auto, context 1/4", {**AUTO, **CONTEXT}),
    Way("spt never, units 1/2", {**NEVER, **HALF}),
    Way("spt never, router", {**NEVER, "attention.density": 0.125, "ffn.selector": "router"}),
    Way("Inductor, CUDA graphs", graphs=True),
    Way("spt never, units 1/2, CUDA graphs", {**NEVER, **HALF}, graphs=True),
    Way("spt auto, context 1/4, CUDA graphs", {**AUTO, **CONTEXT}, graphs=True),
)


def calibration(sizes: Sizes, _: Limit) -> Iterator[Figures]:
    """Seconds of the measurements that "auto" decides by, and what they found."""
    began = time.monotonic()
    costs = calibrate(sizes.device, default_blocks if sizes.dry else kernel_blocks)
    numbers = {name: value for name, value in vars(costs).items() if isinstance(value, float)}
    yield {"seconds_to_calibrate": time.monotonic() - began, **numbers, "half": vars(costs.half)}


def step(length: int, way: Way, sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """Seconds to prepare and of the first step, which compiles; then milliseconds of a step. `loss` is that before any step."""
    began = time.monotonic()
    torch.manual_seed(0)
    model, batch = make_model(length, sizes), make_batch(length, sizes)
    if way.options and way.options.get("ffn.selector") == "router":
        sptc.prepare(model, batch, way.options)
    prepared = time.monotonic()
    limit.check()
    run = compiled(model, way, sizes.dry)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=not sizes.dry)

    def once() -> Tensor:
        if way.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    loss = float(once())
    row: Figures = {"loss": loss, "prepare_seconds": prepared - began, "first_step_seconds": time.monotonic() - prepared}
    if way.options is not None:
        row["rewritten"] = sum(region.status == "rewritten" for region in sptc.report(run).regions)
    yield row
    timing = one(once, sizes, limit)
    yield {"step_ms": timing.ms, "host_ms": timing.host_ms, "peak_mib": timing.peak_mib, "loss_after": float(once())}


def make_model(length: int, sizes: Sizes) -> nn.Module:
    """A LlamaForCausalLM with random weights and adapters on every projection, all in one dtype."""
    from peft import LoraConfig, get_peft_model  # these two take seconds to import, and are needed here alone
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes.model, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False)
    with torch.device(sizes.device):
        base = LlamaForCausalLM(config).to(sizes.dtype)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora, autocast_adapter_dtype=False).to(sizes.device).train()


def make_batch(length: int, sizes: Sizes) -> dict[str, Tensor]:
    """Random tokens; the last of each sequence have labels."""
    ids = torch.randint(sizes.model["vocab_size"], (sizes.tokens // length, length), device=sizes.device)
    labels = ids.clone()
    labels[:, : length - length // _COUNTED] = -100
    return {"input_ids": ids, "labels": labels}


def compiled(model: nn.Module, way: Way, dry: bool) -> Any:
    """In a dry run without Inductor, whose C++ takes a minute to compile."""
    graphs: dict[str, Any] = {"triton.cudagraphs": True} if way.graphs else {}
    if way.options is None:
        return torch.compile(model, dynamic=False, backend="aot_eager") if dry else torch.compile(model, dynamic=False, options=graphs)
    options = {**way.options, "inductor": graphs}
    if not dry:
        return torch.compile(model, dynamic=False, backend=spt, options=options)
    config = Config.from_options(options)
    backend = functools.partial(compile_graph, config=config, inner=lambda gm, inputs, _: aot_eager(gm, inputs))
    return torch.compile(model, dynamic=False, backend=backend)
