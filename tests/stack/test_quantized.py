"""Quantized bases under LoRA: attention is rewritten; an FFN's products are calls of the quantizer's own, and it is refused for that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.stack.loop import loop
from tests.stack.matrix import Cell, Run, check, rows
from tests.stack.models import llama, lora
from tests.stack.results import record


def int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def int4(model: nn.Module) -> None:
    """The form of int4 that torchao has for every device; that of its kernels needs a GPU."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def nf4(model: Any) -> None:
    """As transformers' `load_in_4bit` does it."""
    import bitsandbytes as bnb

    def layer(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4", blocksize=64)
        return new

    replace(model, layer)
    model.is_loaded_in_4bit = True


def llm_int8(model: Any) -> None:
    """As transformers' `load_in_8bit` does it."""
    import bitsandbytes as bnb

    def layer(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        return new

    replace(model, layer)
    model.is_loaded_in_8bit = True


def replace(model: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer(module).to("cpu"))  # the move quantizes


def train(run: Run, quantize: Callable[[Any], None]) -> None:
    base = llama()
    quantize(base)
    model = run.train(lora(base))
    run.compile_in_place(model)
    loop(run, model)


def cell(name: str, quantize: Callable[[Any], None], package: str, compiles: int = 1) -> Cell:
    says = {"ffn": "as those on quantized weights are"}
    return Cell(name, partial(train, quantize=quantize), compiles, {"attention": 2}, says, needs=package)


CELLS = (
    cell("torchao, int8 weight-only", int8, "torchao"),
    cell("torchao, int4 weight-only", int4, "torchao"),
    cell("bitsandbytes, 4 bits (NF4)", nf4, "bitsandbytes"),
    cell("bitsandbytes, 8 bits", llm_int8, "bitsandbytes", compiles=2),
)


@pytest.mark.parametrize("cell", rows("Quantized bases, LoRA", CELLS))
def test_quantized(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    record(record_property, check(cell, tmp_path))
