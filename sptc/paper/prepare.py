"""`sptc.prepare(model, example_inputs)`: find the regions of a model and give their owners trainable state."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch._dynamo
import torch.distributed as dist
from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule

from sptc.backend import captured_unit
from sptc.config import Config
from sptc.ir.errors import SptcError
from sptc.ir.plan import Plan
from sptc.model.capture import capture
from sptc.paper import adapter
from sptc.paper.state import DenseNotice, Router, TrainableState, attach, owners, strip
from sptc.paper.trial import Check, Trial
from sptc.passes import ANALYSIS
from sptc.passes.runner import run
from sptc.passes.unit import Unit
from sptc.reports.report import Report


class PrepareError(SptcError, ValueError):
    """The model can't be prepared: what is wrong with it, and what to do."""


def prepare(model: nn.Module, example_inputs: Any, options: Mapping[str, Any] | None = None) -> Report:
    """Attach the trainable state of the paper's own recipe: routers of FFNs (with stand-ins for the blocks that they leave out) where
    `ffn.selector` is "router", codebooks of attention where `attention.selector` is "pq". The default selectors have no state.

    Call it after PEFT and before the optimizer, DistributedDataParallel and `torch.compile`, in the mode (train or eval) to be compiled:

        model = get_peft_model(base, LoraConfig(...))
        paper = {"ffn.selector": "router", "attention.selector": "pq"}
        sptc.prepare(model, batch, paper)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        optimizer.register_step_post_hook(lambda *_: sptc.step(model))
        model.compile(backend="spt", options=paper)

    The example batch runs twice through the model, without gradients: the first run finds the regions and fits the start of their state,
    the second one checks that the state reaches them. Random state and buffers are restored. Regions that are refused get no state, nor
    do those that a plan keeps dense; the report tells which. Under torch.distributed every rank calls it, and all get the state of rank
    0. Times have no say: a model gets the same state on every machine. Code that was compiled before is forgotten, since Dynamo does not
    notice new hooks. A prepared model computes in eager mode what it did before; its `state_dict` has new entries under `spt`: load a
    checkpoint of it into a prepared model.

    On a PeftModel the state becomes part of what the adapter saves. To load it, prepare the fresh model before or after PEFT loads it:

        model = PeftModel.from_pretrained(base, folder)        |    sptc.prepare(base, batch, paper)
        sptc.prepare(model, batch, paper)                      |    model = PeftModel.from_pretrained(base, folder)
        model.load_adapter(folder, model.active_adapter)       |

    Args:
        model: the model; one that `torch.compile` wrapped is unwrapped.
        example_inputs: a batch as training will see it: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        options: as for `torch.compile(model, backend="spt", options=...)`; at least one of the two selectors above.

    Raises:
        PrepareError: the options ask for no state, or the model is prepared already, wrapped for distributed training, scripted, or not
            loaded.
        ConfigError: unknown option, wrong type, or out of range.
        CaptureError: Dynamo captured nothing of the model.
    """
    config = Config.from_options(options)
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    _check(model)
    if config.plan is not None:
        config = Plan.load(config.plan).applied_to(config)
    if config.ffn_selector != "router" and config.attention_selector != "pq":
        raise PrepareError(
            "the selectors 'energy' and 'pooled' have no trainable state: compile the model as it is, "
            "or prepare it with options={'ffn.selector': 'router'} or {'attention.selector': 'pq'}"
        )
    config = replace(config, decline="never", inference="sparse")

    def judge(gm: fx.GraphModule, inputs: list[Any]) -> Unit:
        return run(captured_unit(gm, inputs, config), ANALYSIS)

    trial, check = Trial(model, judge), Check(judge)
    capture(model, example_inputs, trial.on_graph)
    states = _states(trial, DenseNotice())
    _agree(states)
    _attach(model, states)
    try:
        capture(model, example_inputs, check.on_graph)
        _drop_unreached(model, states, check.reached)
        adapter.adopt(model)
    except BaseException:
        for _, owner in list(owners(model)):
            strip(owner)
        raise
    torch._dynamo.reset()
    last = check.units[-1]
    return Report.of([*check.units[:-1], replace(last, refusals=(*last.refusals, *trial.refusals))])


def detach(model: nn.Module) -> nn.Module:
    """Undo `prepare`: take away the trainable state that it added, and the hooks. The plain model, which is `model` itself, is left.

    Its state is lost; save it before (`model.state_dict()`, or the adapter's `save_pretrained`). What the user trains is not touched. Code
    that was compiled before is forgotten, since Dynamo does not notice that hooks are gone. A model without such state stays as it is.

    Args:
        model: a prepared model, a PeftModel around one, or what `merge_and_unload` made of that; one that `torch.compile` wrapped is
            unwrapped.
    """
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    for _, owner in list(owners(model)):
        strip(owner)
    adapter.release(model)
    torch._dynamo.reset()
    return model


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PrepareError(f"prepare needs an nn.Module, got {type(model).__name__}")
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, parallel) or type(model).__name__ == "FullyShardedDataParallel":
        raise PrepareError(f"prepare the model before {type(model).__name__} wraps it, so that the new parameters are synchronised too")
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is not None and any(isinstance(module, sharding.FSDPModule) for module in model.modules()):
        raise PrepareError("prepare the model before fully_shard, so that the new parameters are sharded and synchronised too")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise PrepareError("a scripted module can't be prepared; prepare the Python module it was made from")
    if any(p.is_meta for p in model.parameters()):
        raise PrepareError("the model has parameters on the meta device; load its weights, then prepare it")
    for name, _ in owners(model):
        raise PrepareError(f"the model is prepared already ({name or 'the root'} has `spt`); to change options, sptc.detach(model) first")
    adapter.check(model)


def _states(trial: Trial, notice: DenseNotice) -> dict[str, TrainableState]:
    """The state of each owner, by the owner's name."""
    states = {}
    for owner, samples in trial.samples.items():
        names, slots = (f"ffn{i}" for i in itertools.count()), {}
        for key, sample in samples.items():
            assert sample.slot is not None, "every call that a graph holds was seen"
            slots[next(names) if isinstance(sample.slot, Router) else key] = sample.slot
        states[owner] = TrainableState(slots, notice)
    return states


def _agree(states: Mapping[str, TrainableState]) -> None:
    """Under torch.distributed all ranks start from the state of rank 0: each was fitted to a batch of its own, and a wrapper that shards
    parameters would make a mixture of them."""
    if dist.is_available() and dist.is_initialized():
        for state in states.values():
            for tensor in state.tensors():
                dist.broadcast(tensor.detach(), 0)


def _attach(model: nn.Module, states: Mapping[str, TrainableState]) -> None:
    for name in states:
        if hasattr(model.get_submodule(name), "spt"):
            raise PrepareError(f"{name or 'the model'} has an attribute 'spt' of its own, which trainable state needs; rename it")
    for name, state in states.items():
        attach(model.get_submodule(name), state)


def _drop_unreached(model: nn.Module, states: Mapping[str, TrainableState], reached: set[int]) -> None:
    """Detach the slots that no region of a captured graph received: they would never train."""
    for name, state in states.items():
        slots = {key: slot for key, slot in state.slots().items() if id(slot.tensors()[0]) in reached}
        if len(slots) < len(state.slots()):
            strip(model.get_submodule(name))
            if slots:
                attach(model.get_submodule(name), TrainableState(slots, state.notice))
