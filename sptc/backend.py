"""`torch.compile(model, backend="spt")`: options, passes, Inductor. The whole story on one screen."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._logging import warning_once

import sptc.codegen.ops  # noqa: F401  registers the sptc operators
from sptc.codegen.cpu.attention import default_blocks
from sptc.codegen.ops.returned import joined
from sptc.codegen.triton.launchers.selection import default_blocks as kernel_blocks
from sptc.codegen.triton.target import KERNEL_DTYPES, runs_kernels
from sptc.config import Config, ConfigError
from sptc.device.costs import calibrate
from sptc.device.fingerprint import fingerprint
from sptc.device.heap import give_back
from sptc.ir.plan import Plan
from sptc.model.compiled import CompiledGraph
from sptc.model.logits import deferred_logits
from sptc.model.recompiles import limit_note
from sptc.model.wrapped import refuse_wrapped_model
from sptc.passes import ANALYSIS, PIPELINE, REWRITING
from sptc.passes.graph.effects import returns_after_writes
from sptc.passes.runner import run
from sptc.passes.unit import Unit
from sptc.plans.rise import weigh
from sptc.reports.dump import Dump
from sptc.reports.emit import emit
from sptc.reports.patience import shown
from sptc.reports.report import Report
from sptc.reports.summary import Summary, traced_code

log = logging.getLogger(__name__)
_summary = Summary()

KEEPING_LITTLE = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
}
"""Settings of `torch._functorch.config` with which AOTAutograd's partitioner keeps little. Its ban on long chains stays: without
it the residual stream of all layers is computed again at the begin of backward, and lies in memory at once."""

Inner = Callable[[fx.GraphModule, list[Any], Config], Callable[..., Any]]


def spt(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None, **unsupported: Any
) -> Callable[..., Any]:
    """The Dynamo backend. Options are those of `sptc.Config`, as flat dotted keys.

    Raises:
        ConfigError: unknown option, wrong type, out of range, a `mode`, or a device without kernels.
    """
    if unsupported:
        names = ", ".join(f"{key}={value!r}" for key, value in unsupported.items())
        raise ConfigError(f"backend 'spt' takes no {names}; pass Inductor's settings as options={{'inductor': {{...}}}}")
    return compile_graph(gm, example_inputs, Config.from_options(options))


def inductor(gm: fx.GraphModule, example_inputs: list[Any], config: Config) -> Callable[..., Any]:
    """Compile by Inductor. The key of its cache and of AOTAutograd's holds our sources: an upgrade never runs what was traced before it."""
    config_module: Any = torch.compiler.config
    tagged = functools.partial(config_module.patch, cache_key_tag=f"{config_module.cache_key_tag}sptc-{fingerprint()}")
    with tagged():
        # Twice, as compile_fx itself does with config_patches: the backward graph is compiled later, out of this scope.
        compiled: Any = compile_fx(gm, example_inputs, inner_compile=tagged()(_patiently), config_patches=config.inductor or None)
    gc.collect()  # graphs are cycles, those that are done with would stay beneath what a step takes; Dynamo collects young ones alone
    give_back()
    return compiled


def _patiently(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Any:
    """What compiles a forward or a backward graph, with a line on a terminal while it lasts."""
    which = "backward" if settings.get("is_backward") else "forward"
    with shown(f"Inductor compiles a {which} graph of {len(gm.graph.nodes)} nodes"):
        return compile_fx_inner(gm, example_inputs, **settings)


def captured_unit(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Unit:
    """A captured graph at the start of the passes, with what is known of the device it runs on.

    Raises:
        ConfigError: a device without kernels, a plan that can't be read or contradicts an option, or a pass to disable that there is not.
    """
    passes = [apply.__name__ for apply, _ in PIPELINE]
    for name in config.disable or ():
        if name not in passes:
            raise ConfigError(f"option 'disable': there is no pass {name!r} to leave out; known: {', '.join(passes)}")
    device = _device(example_inputs)
    kernels = runs_kernels(device)
    costs = calibrate(device, kernel_blocks if kernels else default_blocks)
    plan = None if config.plan is None else Plan.load(config.plan)
    if plan is not None:
        config = plan.applied_to(config)
    return Unit(gm, tuple(example_inputs), config, replace(costs, dtypes=KERNEL_DTYPES) if kernels else costs, plan)


def compile_graph(gm: fx.GraphModule, example_inputs: list[Any], config: Config, inner: Inner = inductor) -> CompiledGraph:
    """Run the passes on one captured graph and compile the result with `inner`."""
    refuse_wrapped_model()
    dump = Dump.of(config)
    try:
        unit = captured_unit(gm, example_inputs, config)
        if dump is not None:
            dump("captured", unit)
        unit = run(unit, (*ANALYSIS, (weigh, "how much FFNs may leave out, on the batch at hand"), *REWRITING), observe=dump)
        report = Report.of([unit])
        for note in report.notes:  # an unprepared region, a frozen router: once in the log, however often a graph is compiled
            warning_once(log, note)
        for refusal in unit.refusals:
            if refusal.rule == "state":  # parameters that the user trains and that this graph does not use
                warning_once(log, f"{refusal.site.module or 'the model'}: {refusal.reason}")
        if unit.closed is not None:
            warning_once(log, f"{unit.closed.site.source or 'a graph'}: {unit.closed.reason}; Inductor compiles it as it was captured")
        code = traced_code()
        if code is not None and (limit := limit_note(code, coming=1)) is not None:
            warning_once(log, limit)
        kernels = emit(unit, _device(example_inputs))
        # A graph in which nothing was rewritten is compiled as it was captured: what is not ours, we leave alone.
        rewritten = any(decision.rewrite for decision in unit.decisions)
        with _keeping_little(unit, rewritten):
            compiled, dropped = inner(unit.gm if rewritten else gm, example_inputs, config), unit.dropped
        if unit.handles:
            deferred = {place: functools.partial(deferred_logits, how.gm, how.inputs) for place, how in unit.deferred.items()}
            compiled = joined(compiled, unit.handles, deferred)
        called = _summary.gather(report, config, example_inputs)
    except (TorchDynamoException, ConfigError):
        raise  # Dynamo restarts a capture this way; a wrong option or state is the user's to mend
    except Exception:
        if config.on_error != "dense":
            raise
        log.warning("sptc failed on a graph and leaves it dense, as on_error='dense' asks", exc_info=True)
        report, kernels, dropped, called = Report.of([]), (), (), None
        compiled = inner(gm, example_inputs, config)
    if dump is not None:
        dump.report(report)
        dump.kernels(kernels)
    return CompiledGraph(compiled, report, example_inputs, dropped, called)


spt.reset = _summary.forget  # type: ignore[attr-defined]  # what torch._dynamo.reset() calls


def _keeping_little(unit: Unit, rewritten: bool) -> AbstractContextManager[Any]:
    """Where a region is rewritten, AOTAutograd's partitioner keeps for backward only what is not cheap to compute again.

    By default it keeps whatever backward's products read as it is: outputs of norms, copies of weights in another dtype, activations. To
    read those takes about as long as to compute them (docs/design/deciding.md). It takes no notice of writes: what follows from an input
    that the graph changes in place would be computed of the new value. With objective "memory" it is so in graphs without regions, too.
    """
    if not (rewritten or unit.config.objective == "memory") or returns_after_writes(unit.gm):
        return nullcontext()
    patch: AbstractContextManager[Any] = functorch_config.patch(KEEPING_LITTLE)
    return patch


def _device(example_inputs: Sequence[Any]) -> torch.device:
    devices = [x.device for x in example_inputs if isinstance(x, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
