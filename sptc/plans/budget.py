"""Which density each region gets for a budget of time, of error or of memory, from what was measured of each.

Moves go from dense towards sparse, each time the one that adds the least squared error for a second saved. Within a region only the lower
convex hull of (seconds, squared error) matters, so the ratios rise along the way: the moves form one sequence, and every target is a
prefix of it. Plans for rising targets are nested, the errors are the least that any plan of the same time has, and what a prefix saves
beyond its target is part of one move: an exact search (the problem is a knapsack) could gain no more.

The squared errors that choose are halfway between those measured and the mean of the regions of the kind at that density: measured ones
are of one batch before training, too little to starve a region for. What a plan says of its error, and what `max_error` limits, is as
measured. docs/quality.md has what such plans learn.

For a budget of memory the moves save bytes, and those without an error come first, the least seconds for a byte before others.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from sptc.ir.errors import SptcError
from sptc.ir.plan import Choice, Plan, PlannedRegion, combined


class PlanError(SptcError, ValueError):
    """No plan can be made: the target is malformed or out of reach."""


def check_target(
    speedup: float | None = None, max_error: float | None = None, max_memory: float | None = None, max_rise: float | None = None
) -> None:
    """Raises PlanError unless exactly one target is given, and in its range."""
    targets = {"speedup": speedup, "max_error": max_error, "max_memory": max_memory, "max_rise": max_rise}
    if sum(target is not None for target in targets.values()) != 1:
        raise PlanError("give exactly one of speedup, max_error, max_memory and max_rise")
    for name, target in targets.items():
        if target is not None and (isinstance(target, bool) or not isinstance(target, numbers.Real)):
            raise PlanError(f"{name} must be a number{' of bytes' * (name == 'max_memory')}, got {target!r}")
    if speedup is not None and not 1 < speedup < math.inf:
        raise PlanError(f"speedup must be above 1, got {speedup}")
    if max_error is not None and not 0 <= max_error < math.inf:
        raise PlanError(f"max_error must be a number of at least 0, got {max_error}")
    if max_rise is not None and not 0 <= max_rise < math.inf:
        raise PlanError(f"max_rise must be a number of at least 0, got {max_rise}")
    if max_memory is not None and not 0 < max_memory < math.inf:
        raise PlanError(f"max_memory must be a number of bytes above 0, got {max_memory}")


def replan(
    plan: Plan,
    *,
    speedup: float | None = None,
    max_error: float | None = None,
    max_memory: float | None = None,
    squares: Mapping[tuple[str, float], float] | None = None,
) -> Plan:
    """The plan for another target, by the figures of this one: as few moves as reach the speed-up or the memory, or as many as the error
    allows.

    `squares` are the squared errors to choose by, of each region (by key) and density; without them `expected_squares`.

    Raises:
        PlanError: as `plan`, by which nothing is measured here.
    """
    check_target(speedup, max_error, max_memory)
    expected = expected_squares(plan.regions) if squares is None else squares
    step = _towards_time if max_memory is None else _towards_memory
    moves = sorted((move for region in plan.regions for move in _moves(region, expected, step)), key=lambda move: move[:2])
    chosen = {region.key: region.dense for region in plan.regions}

    def time() -> float:
        return plan.other_seconds + math.fsum(c.seconds for c in chosen.values())

    def kept() -> float:
        return plan.losses_kept + math.fsum(c.kept for c in chosen.values())

    dense = time()
    for _, key, after in moves:
        if speedup is not None and dense / time() >= speedup:
            break
        if max_memory is not None and kept() <= max_memory:
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
    if max_memory is not None and kept() > max_memory:
        raise PlanError(
            f"a memory of {max_memory:.0f} bytes is out of reach: with every region in the form that keeps least, {math.ceil(kept())} are "
            f"kept for backward (predicted; {plan.dense_kept:.0f} if all is dense, {plan.losses_kept:.0f} of them by losses)"
        )
    given = {"speedup": speedup, "max_error": max_error, "max_memory": max_memory}
    target = {key: float(value) for key, value in given.items() if value is not None}
    return replace(plan, target=target, regions=tuple(region.at(chosen[region.key]) for region in plan.regions))


def _down(value: float) -> str:
    """Rounded so that the figure itself is within reach."""
    return f"{math.floor(value * 100) / 100:.2f}"


Price = tuple[float, float]  # of a move, for each second or byte saved: squared error added; what else it costs, or 0
Move = tuple[Price, str, Choice]  # price, key, where to
Step = Callable[[Choice, Choice, float], Price | None]  # from, to, squared error added -> price; None if it saves nothing


def _towards_time(at: Choice, to: Choice, added: float) -> Price | None:
    saved = at.seconds - to.seconds
    return (added / saved, 0.0) if saved > 0 and not to.lean else None


def _towards_memory(at: Choice, to: Choice, added: float) -> Price | None:
    """What is exact comes before all else, the least seconds for a byte first."""
    saved = at.kept - to.kept
    return (added / saved, (to.seconds - at.seconds) / saved) if saved > 0 else None


def expected_squares(regions: Sequence[PlannedRegion]) -> dict[tuple[str, float], float]:
    """Squared error to choose by, of each region (by key) and density: halfway from its own to the mean of the kind at that density."""
    of_kind: dict[tuple[str, float], list[float]] = {}
    for region in regions:
        for choice in region.choices:
            of_kind.setdefault((region.kind, choice.density), []).append(choice.error**2)
    mean = {where: math.fsum(squares) / len(squares) for where, squares in of_kind.items()}
    return {(r.key, c.density): (c.error**2 + mean[r.kind, c.density]) / 2 for r in regions for c in r.choices}


def _moves(region: PlannedRegion, squares: Mapping[tuple[str, float], float], step: Step) -> list[Move]:
    """The steps along the lower convex hull of one region, from dense on."""
    at = region.dense
    moves: list[Move] = []
    while True:
        added = [(step(at, c, squares[region.key, c.density] - squares[region.key, at.density]), c) for c in region.choices]
        steps = [(price, c) for price, c in added if price is not None]
        if not steps:
            return moves
        price, at = min(steps, key=lambda s: (s[0], s[1].seconds))
        moves.append((price, region.key, at))
