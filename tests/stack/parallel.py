"""Scripts of two processes: each takes every second row of the batch, so that the gradients are those of one process on all of it."""

from __future__ import annotations

import contextlib
import unittest.mock
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sptc
from tests.stack.loop import loop
from tests.stack.matrix import PAPER, Run
from tests.stack.models import batch, llama, lora

ROWS = 4


def alone() -> bool:
    """Whether this is the reference, which has all rows and no group."""
    return not dist.is_initialized()


def share(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of this process."""
    return inputs if alone() else {key: value[dist.get_rank() :: dist.get_world_size()] for key, value in inputs.items()}


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # the hook breaks the graph, and only reentrant checkpoints need it
    return model


def compiled_inside(run: Run, checkpoints: bool = False, **fields: Any) -> None:
    """`model.compile(...)`, then DistributedDataParallel around it."""
    model = run.train(lora(llama()))
    if checkpoints:
        checkpointed(model)
    run.compile_in_place(model)
    loop(run, model, None if alone() else DistributedDataParallel(model, **fields), share(batch(ROWS)))


def compiled_outside(run: Run, **fields: Any) -> None:
    """`torch.compile(DistributedDataParallel(model))`: Dynamo cuts the graph where a bucket of gradients is full."""
    model = run.train(lora(llama()))
    loop(run, model, run.compile(model if alone() else DistributedDataParallel(model, **fields)), share(batch(ROWS)))


def split(run: Run) -> None:
    """`torch.compile(DistributedDataParallel(model))` with many buckets, as models of usual size have: a graph for each."""
    model = run.train(llama())
    with unittest.mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 8192):
        loop(run, model, run.compile(model if alone() else DistributedDataParallel(model, bucket_cap_mb=1 / 64)), share(batch(ROWS)))


def compiled_between(run: Run) -> None:
    """`DistributedDataParallel(torch.compile(model))`."""
    model = run.train(lora(llama()))
    call = run.compile(model)
    loop(run, model, call if alone() else DistributedDataParallel(call), share(batch(ROWS)))


def accumulated(run: Run) -> None:
    """Two micro-batches a step, the first under `no_sync`."""
    model = run.train(lora(llama()))
    run.compile_in_place(model)
    call = model if alone() else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(run.trained.values(), lr=1e-2)
    inputs = batch(2 * ROWS)
    halves = [share({key: value[part] for key, value in inputs.items()}) for part in (slice(ROWS), slice(ROWS, None))]
    for _ in range(4):
        with contextlib.nullcontext() if alone() else call.no_sync():
            (call(**halves[0]).loss / 2).backward()
        loss = call(**halves[1]).loss / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())


def layers(model: Any) -> Any:
    return model.base_model.model.model.layers


def sharded(run: Run, where: str, checkpoints: bool = False, steps: int = 4) -> None:
    """`fully_shard` on every layer and on the model.

    Args:
        where: what is compiled in place: each "layer" before it is sharded, or the whole "model" after.
    """
    model = lora(llama())
    if checkpoints:
        checkpointed(model)
    if where == "layer":
        for layer in layers(model):
            run.compile_in_place(layer)
    if not alone():
        for layer in layers(model):
            fully_shard(layer)
        fully_shard(model)
    if where == "model":
        run.compile_in_place(model)
    elif run.compiled is not None:
        run.compiled = model
    run.train(model)
    loop(run, model, None, share(batch(ROWS)), steps)


def sharded_accumulated(run: Run) -> None:
    """Two micro-batches a step; gradients are reduced at the second one."""
    model = lora(llama())
    for layer in layers(model):
        run.compile_in_place(layer)
        if not alone():
            fully_shard(layer)
    if not alone():
        fully_shard(model)
    if run.compiled is not None:
        run.compiled = model
    run.train(model)
    optimizer = torch.optim.AdamW(run.trained.values(), lr=1e-2)
    inputs = batch(2 * ROWS)
    for _ in range(4):
        for i, part in enumerate((slice(ROWS), slice(ROWS, None))):
            if not alone():
                model.set_requires_gradient_sync(i == 1)
            loss = model(**share({key: value[part] for key, value in inputs.items()})).loss / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())


def accelerated(run: Run) -> None:
    """`Accelerator().prepare`, which wraps the model for two processes, and accumulation by `accumulate`."""
    from accelerate import Accelerator

    model = run.train(lora(llama()))
    run.compile_in_place(model)
    optimizer = torch.optim.AdamW(run.trained.values(), lr=1e-2)
    accelerator = Accelerator(cpu=True)
    call, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(4):
        with accelerator.accumulate(call):
            loss = call(**share(batch(ROWS))).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        run.losses.append(loss.item())


def prepared(run: Run, shard: bool) -> None:
    """The paper's option: each rank prepares with its own rows, and all start from the state of rank 0."""
    model = lora(llama())
    inputs = share(batch(ROWS))
    if run.sparse:
        sptc.prepare(model, inputs, run.options)
        state = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if ".spt." in name])
        states = [torch.empty_like(state) for _ in range(dist.get_world_size())]
        dist.all_gather(states, state)
        assert all(other.equal(state) for other in states)
    if not shard:
        run.train(model)
        run.compile_in_place(model)
        loop(run, model, None if alone() else DistributedDataParallel(model), inputs)
        return
    for layer in layers(model):
        run.compile_in_place(layer)
        if not alone():
            fully_shard(layer)
    if not alone():
        fully_shard(model)
        with pytest.raises(ValueError, match="before fully_shard"):
            sptc.prepare(model, inputs, PAPER)
    if run.compiled is not None:
        run.compiled = model
    run.train(model)
    loop(run, model, None, inputs)
