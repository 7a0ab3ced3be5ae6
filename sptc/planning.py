"""`sptc.plan(model, example_inputs, speedup=1.5)`: densities by region for a budget of time or of error.

Moves go from dense towards sparse, each time the one that adds the least squared error for a second saved. Within a region only the lower
convex hull of (seconds, squared error) matters, so the ratios rise along the way: the moves form one sequence, and every target is a
prefix of it. Plans for rising targets are nested, the errors are the least that any plan of the same time has, and what a prefix saves
beyond its target is part of one move: an exact search (the problem is a knapsack) could gain no more.

The squared errors that choose are halfway between those measured and the mean of the regions of the kind at that density: measured ones
are of one batch before training, too little to starve a region for. What a plan says of its error, and what `max_error` limits, is as
measured. docs/quality.md has what such plans learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sptc.capture import capture
from sptc.config import Config
from sptc.plan import Choice, Plan, PlannedRegion, combined
from sptc.sensitivity import Measured, Sensitivity

_NOT_PLANNED = {"plan", "dump", "on_error", "inductor", "attention.density", "ffn.density"}  # options that a plan does not repeat


class PlanError(ValueError):
    """No plan can be made: the target is malformed or out of reach."""


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
    _check(speedup, max_error)
    config = Config.from_options(options)
    if config.plan is not None:
        raise PlanError("option 'plan' is for applying a plan; leave it out to make one")
    sensitivity = Sensitivity(config, progress)
    capture(model, example_inputs, sensitivity.on_graph, sensitivity.again)
    kept = {key: value for key, value in config.to_options().items() if key not in _NOT_PLANNED}
    regions = tuple(PlannedRegion(key, tuple(sorted(m.graphs)), m.facts, 1.0, _choices(m)) for key, m in sensitivity.regions.items())
    return replan(Plan({}, kept, sensitivity.other_seconds, regions), speedup=speedup, max_error=max_error)


def _check(speedup: float | None, max_error: float | None) -> None:
    if (speedup is None) == (max_error is None):
        raise PlanError("give exactly one of speedup and max_error")
    if speedup is not None and not 1 < speedup < math.inf:
        raise PlanError(f"speedup must be above 1, got {speedup}")
    if max_error is not None and not 0 <= max_error < math.inf:
        raise PlanError(f"max_error must be a number of at least 0, got {max_error}")


def replan(plan: Plan, *, speedup: float | None = None, max_error: float | None = None) -> Plan:
    """The plan for another target, by the figures of this one: as few moves as reach the speed-up, or as many as the error allows.

    Raises:
        PlanError: as `plan`, by which nothing is measured here.
    """
    _check(speedup, max_error)
    expected = expected_squares(plan.regions)
    moves = sorted((move for region in plan.regions for move in _moves(region, expected)), key=lambda move: move[:2])
    chosen = {region.key: region.choices[0] for region in plan.regions}

    def time() -> float:
        return plan.other_seconds + math.fsum(c.seconds for c in chosen.values())

    dense = time()
    for _, key, after in moves:
        if speedup is not None and dense / time() >= speedup:
            break
        if max_error is not None and combined(c.error for c in {**chosen, key: after}.values()) > max_error:
            break
        chosen[key] = after
    seconds = time()
    if speedup is not None and dense / seconds < speedup:
        raise PlanError(
            f"a speed-up of {speedup:g} is out of reach: with every region at the density that is fastest it is {_down(dense / seconds)} "
            f"(predicted; {plan.other_seconds / dense:.0%} of the dense time lies outside of attention and FFN)"
        )
    given = {"speedup": speedup, "max_error": max_error}
    target = {key: float(value) for key, value in given.items() if value is not None}
    return replace(plan, target=target, regions=tuple(replace(region, density=chosen[region.key].density) for region in plan.regions))


def _down(value: float) -> str:
    """Rounded so that the figure itself is within reach."""
    return f"{math.floor(value * 100) / 100:.2f}"


def _choices(measured: Measured) -> tuple[Choice, ...]:
    """Dense, then what was tried, from dense to sparse; a density at which the model overflows is none."""
    tried = [Choice(density, measured.seconds[density], error) for density, error in measured.errors.items() if math.isfinite(error)]
    return (Choice(1.0, measured.seconds[1.0], 0.0), *sorted(tried, key=lambda c: -c.density))


Move = tuple[float, str, Choice]  # squared error added for a second saved, key, where to


def expected_squares(regions: Sequence[PlannedRegion]) -> dict[tuple[str, float], float]:
    """Squared error to choose by, of each region (by key) and density: halfway from its own to the mean of the kind at that density."""
    of_kind: dict[tuple[str, float], list[float]] = {}
    for region in regions:
        for choice in region.choices:
            of_kind.setdefault((region.kind, choice.density), []).append(choice.error**2)
    mean = {where: math.fsum(squares) / len(squares) for where, squares in of_kind.items()}
    return {(r.key, c.density): (c.error**2 + mean[r.kind, c.density]) / 2 for r in regions for c in r.choices}


def _moves(region: PlannedRegion, squares: Mapping[tuple[str, float], float]) -> list[Move]:
    """The steps along the lower convex hull of one region, from dense on."""

    def square(choice: Choice) -> float:
        return squares[region.key, choice.density]

    at, moves = region.choices[0], []
    while faster := [c for c in region.choices if c.seconds < at.seconds]:
        ratios = [(square(c) - square(at)) / (at.seconds - c.seconds) for c in faster]
        ratio, _, at = min(zip(ratios, (c.seconds for c in faster), faster, strict=True), key=lambda step: step[:2])
        moves.append((ratio, region.key, at))
    return moves
