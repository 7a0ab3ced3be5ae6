"""`sptc.plan(model, example_inputs, speedup=1.5)`: densities by region for a budget of time or of error.

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
from sptc.plans.sensitivity import Measured, Sensitivity

_NOT_PLANNED = {"plan", "dump", "on_error", "inductor", "attention.density", "ffn.density"}  # options that a plan does not repeat


def plan(
    model: Callable[..., Any],
    example_inputs: Any,
    *,
    speedup: float | None = None,
    max_error: float | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Choose a density for each region: sparse where it harms least, as far as a speed-up needs or an error allows.

        sptc.plan(model, batch, speedup=1.5).save("plan.json")
        model.compile(backend="spt", options={"plan": "plan.json"})

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
        options: as for `torch.compile(model, backend="spt", options=...)`; the plan keeps them. Densities in them have no effect.
        progress: called with (runs done, runs in all).

    Raises:
        PlanError: not exactly one target, one out of range, or a speed-up that no densities reach; the best one is named.
        SensitivityError: the model returns nothing that can be measured, or its time can't be predicted.
        ConfigError, CaptureError: as `sptc.explain`.
    """
    check_target(speedup, max_error)
    config = Config.from_options(options)
    if config.plan is not None:
        raise PlanError("option 'plan' is for applying a plan; leave it out to make one")
    sensitivity = Sensitivity(config, progress)
    capture(model, example_inputs, sensitivity.on_graph, sensitivity.again)
    kept = {key: value for key, value in config.to_options().items() if key not in _NOT_PLANNED}
    regions = tuple(PlannedRegion(key, tuple(sorted(m.graphs)), m.facts, 1.0, _choices(m)) for key, m in sensitivity.regions.items())
    return replan(Plan({}, kept, sensitivity.other_seconds, regions), speedup=speedup, max_error=max_error)


def _choices(measured: Measured) -> tuple[Choice, ...]:
    """Dense, then what was tried, from dense to sparse; a density at which the model overflows is none."""
    tried = [Choice(density, measured.seconds[density], error) for density, error in measured.errors.items() if math.isfinite(error)]
    return (Choice(1.0, measured.seconds[1.0], 0.0), *sorted(tried, key=lambda c: -c.density))
