"""Loops that people write themselves: where they compile, what they train, in which precision, by which optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.stack.loop import loop
from tests.stack.matrix import Cell, Run, check, rows
from tests.stack.models import batch, llama, lora
from tests.stack.results import record


def whole(run: Run, make: Callable[[], Any] = lambda: lora(llama()), **more: Any) -> Any:
    """`compiled = torch.compile(model, backend="spt")`."""
    model = run.train(make())
    loop(run, model, run.compile(model), **more)
    return model


def in_place(run: Run) -> None:
    model = run.train(lora(llama()))
    run.compile_in_place(model)
    loop(run, model)


def layer_by_layer(run: Run) -> None:
    """Regional compilation: every layer by itself, in place. The second layer needs a graph for an input with a gradient."""
    model = run.train(lora(llama()))
    for layer in model.base_model.model.model.layers:
        run.compile_in_place(layer)
    run.compiled = model
    loop(run, model)


def step_function(run: Run) -> None:
    """A function that computes the loss is compiled; backward and the optimizer are outside."""
    model = run.train(lora(llama()))

    def output(**inputs: Any) -> Any:
        return model(**inputs)

    loop(run, model, run.compile(output))


def compiled_optimizer(run: Run) -> None:
    """The optimizer's step is compiled by the same backend, as torch's tutorial does it."""
    model = run.train(lora(llama()))
    run.compile_in_place(model)
    optimizer = torch.optim.AdamW(run.trained.values(), lr=1e-2, foreach=True)
    step = run.compile(lambda: optimizer.step()) if run.kind == "sparse" else optimizer.step
    run.compiled = model
    for _ in range(5):
        loss = model(**batch()).loss
        loss.backward()
        step()
        optimizer.zero_grad()
        run.losses.append(loss.item())


def before_the_adapter(run: Run) -> None:
    """The base model is compiled in place, the adapter is put around it afterwards."""
    base = llama()
    run.compile_in_place(base)
    loop(run, run.train(lora(base)))


def partly_frozen() -> Any:
    """The last layer and the head train, weights and all; the first layer is left as it is."""
    model = llama()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name or "lm_head" in name)
    return model


def autocast(run: Run, dtype: torch.dtype) -> None:
    model = run.train(lora(llama()))
    compiled = run.compile(model)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    optimizer = torch.optim.AdamW(run.trained.values(), lr=1e-2)
    for _ in range(5):
        with torch.autocast("cpu", dtype):
            loss = compiled(**batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.losses.append(loss.item())


def averaged(run: Run) -> None:
    """An exponential average beside the compiled model (`swa_utils.AveragedModel`): a plain copy, dense, never compiled."""
    model = run.train(lora(llama()))
    run.compile_in_place(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(run.trained.values(), lr=1e-2)
    by_hand = {name: p.detach().clone() for name, p in run.trained.items()}
    for i in range(5):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        by_hand = {name: p.detach().clone() if i == 0 else (by_hand[name] + p.detach()) / 2 for name, p in run.trained.items()}
        run.losses.append(loss.item())
    averages = dict(average.module.named_parameters())
    torch.testing.assert_close({name: averages[name].detach() for name in by_hand}, by_hand)
    compiled = run.compiles
    with torch.no_grad():
        average.eval()(**batch())
    assert run.compiles == compiled


def deep_copied(run: Run) -> None:
    """A deepcopy is compiled anew; its code is that of the model it was copied from, its weights are its own."""
    model = lora(llama())
    run.compile_in_place(model)
    twin = run.train(copy.deepcopy(model))
    before = [p.detach().clone() for p in model.parameters()]
    run.compile_in_place(twin)
    loop(run, twin)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def fabric(run: Run) -> None:
    """Lightning Fabric: `setup` around a model that was compiled in place."""
    from lightning_fabric import Fabric

    model = run.train(lora(llama()))
    run.compile_in_place(model)
    fabric = Fabric(accelerator="cpu", devices=1)
    call, optimizer = fabric.setup(model, torch.optim.AdamW(run.trained.values(), lr=1e-2))
    for _ in range(5):
        loss = call(**batch()).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())


def accelerate(run: Run, precision: str) -> None:
    """`Accelerator().prepare` in one process."""
    from accelerate import Accelerator

    model = run.train(lora(llama()))
    run.compile_in_place(model)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    call, optimizer = accelerator.prepare(model, torch.optim.AdamW(run.trained.values(), lr=1e-2))
    for _ in range(5):
        loss = call(**batch()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())


def adam(**fields: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, **fields)


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    from transformers import Adafactor

    return Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False)


LAYERS = (
    Cell("torch.compile(model)", whole, fast=True),
    Cell("model.compile()", in_place),
    Cell("model.compile(), get_peft_model after it", before_the_adapter),
    Cell("each layer compiled", layer_by_layer, 2, fast=True),
    Cell("a function that calls the model", step_function),
    Cell("the optimizer's step compiled too", compiled_optimizer, 3),
    Cell("a deepcopy, compiled anew", deep_copied),
)
PRECISIONS = (
    Cell("frozen weights, LoRA, fp32", whole),
    Cell("partly frozen weights", partial(whole, make=partly_frozen)),
    Cell("all weights trained", partial(whole, make=llama), fast=True),
    Cell("all weights trained, bf16 weights", partial(whole, make=lambda: llama().bfloat16()), tolerance=0.05),
    Cell("LoRA, bf16 weights of the base", partial(whole, make=lambda: lora(llama().bfloat16())), tolerance=0.05),
    Cell("bf16 autocast", partial(autocast, dtype=torch.bfloat16), tolerance=0.05),
    Cell("bf16 autocast, by Inductor", partial(autocast, dtype=torch.bfloat16), tolerance=0.05, inductor=True),
    Cell("fp16 autocast, GradScaler", partial(autocast, dtype=torch.float16), tolerance=0.05),
)
OPTIMIZERS = (
    Cell("AdamW(foreach=True)", partial(whole, make_optimizer=adam(foreach=True))),
    Cell("AdamW(fused=True)", partial(whole, make_optimizer=adam(fused=True))),
    Cell("SGD", partial(whole, make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9))),
    Cell("Adafactor", partial(whole, make_optimizer=adafactor)),
    Cell("swa_utils.AveragedModel, an EMA", averaged),
)
FRAMEWORKS = (
    Cell("accelerate, Accelerator().prepare", partial(accelerate, precision="no")),
    Cell("accelerate, bf16", partial(accelerate, precision="bf16"), tolerance=0.05),
    Cell("Lightning Fabric", fabric, needs="lightning_fabric"),
)
GROUPS = {
    "Where torch.compile is called": LAYERS,
    "Weights and precision": PRECISIONS,
    "Optimizers and averages": OPTIMIZERS,
    "Loops with a framework": FRAMEWORKS,
}


@pytest.mark.parametrize("cell", [row for group, cells in GROUPS.items() for row in rows(group, cells)])
def test_loop(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    record(record_property, check(cell, tmp_path))
