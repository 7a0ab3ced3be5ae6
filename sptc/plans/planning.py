"""`sptc.plan(model, example_inputs, speedup=1.5)`: densities by region for a budget of time, of error or of memory.

`sptc/plans/budget.py` chooses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sptc.config import Config
from sptc.ir.plan import Choice, Plan, PlannedRegion
from sptc.model.capture import capture
from sptc.plans.budget import PlanError, check_target, replan
from sptc.plans.rising import Rising
from sptc.plans.sensitivity import DENSE, LEAN, Measured, Sensitivity

# Options that a plan does not repeat.
_NOT_PLANNED = {"plan", "dump", "on_error", "inductor", "attention.density", "ffn.density", "max_rise"}


def plan(
    model: Callable[..., Any],
    example_inputs: Any,
    *,
    speedup: float | None = None,
    max_error: float | None = None,
    max_memory: float | None = None,
    max_rise: float | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Choose a density for each region: sparse where it harms least, as far as a speed-up or a memory needs or an error or a loss allows.

        plan = sptc.plan(model, batch, speedup=1.5)  # plan.save("plan.json") for other runs
        model.compile(backend="spt", options={"plan": plan})  # or "plan.json"

    `prepare` and `explain` take the option too; preparing with a plan gives no state to regions that it keeps dense.
    The batch runs once dense, then once for each region and density, without gradients and without dropout; nothing of the model changes.
    The error of a region at a density is the relative error of the floating tensors that the model returns (such as logits), with this
    region alone sparse; of a model that returns only a loss, of what the loss is computed from. Squares of errors add. A prepared model
    is measured with its routers and codebooks, any other one with blocks chosen by weights and pooled queries; both can be planned, but
    preparing first measures what will run.

    Args:
        model: a module or a function, compiled or not, in the mode to be compiled: in train mode with gradients, seconds are of forward
            and backward. The optimizer's step is not part of them.
        example_inputs: a batch as training will see it: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
            Many examples if the model returns few numbers for each, as a classifier does: a plan trusts what it measures.
        speedup: predicted time of the dense model over that of the planned one, above 1.
        max_error: the greatest predicted relative change, at least 0.
        max_memory: the most bytes that attention, FFNs and losses may keep for backward, predicted: the total of "MB kept" in a report,
            which counts neither parameters nor what lies between the regions. Regions that can keep less and stay exact do so first, those
            first that lose least time by it: hidden values of FFNs are computed again (unless option `ffn.recompute` is False), scores
            of attention that is spelled out are never whole. Then hidden units are left out.
        max_rise: how much the loss may rise before training, relative, at least 0: what a compile without a plan measures on its first
            batch (option `max_rise`), here once and for all runs, and for trainers that compute the loss outside of the model. The
            batch needs the labels by which the model computes its loss.
        options: as for `torch.compile(model, backend="spt", options=...)`; the plan keeps them. Densities in them have no effect.
        progress: called with (runs done, runs in all).

    Raises:
        PlanError: not exactly one target, one out of range, or a speed-up or a memory that no densities reach; the best one is named.
        SensitivityError: the model returns nothing that can be measured, its time can't be predicted, or, for `max_rise`, its loss is in
            none of its graphs.
        ConfigError, CaptureError: as `sptc.explain`.
    """
    check_target(speedup, max_error, max_memory, max_rise)
    config = Config.from_options(options)
    if config.plan is not None:
        raise PlanError("option 'plan' is for applying a plan; leave it out to make one")
    kept = {key: value for key, value in config.to_options().items() if key not in _NOT_PLANNED}
    if max_rise is not None:
        rising = Rising(config, max_rise)
        capture(model, example_inputs, rising.on_graph)
        return rising.plan(kept)
    sensitivity = Sensitivity(config, progress)
    capture(model, example_inputs, sensitivity.on_graph, sensitivity.again)
    regions = tuple(
        PlannedRegion(key, tuple(sorted(m.graphs)), m.facts, 1.0, _choices(m), apart=m.apart) for key, m in sensitivity.regions.items()
    )
    made = Plan({}, kept, sensitivity.other_seconds, regions, sensitivity.losses_kept)
    return replan(made, speedup=speedup, max_error=max_error, max_memory=max_memory)


def _choices(measured: Measured) -> tuple[Choice, ...]:
    """Dense, exact but with less kept, then what was tried, from dense to sparse; a density at which the model overflows is none."""
    errors = {(density, False): error for density, error in measured.errors.items() if math.isfinite(error)}
    forms = [DENSE, *([LEAN] if LEAN in measured.seconds else []), *sorted(errors, reverse=True)]
    return tuple(Choice(form[0], measured.seconds[form], errors.get(form, 0.0), measured.kept[form], form[1]) for form in forms)
