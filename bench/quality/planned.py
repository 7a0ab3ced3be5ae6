"""Preparing a model for a run: as its options say, or with a plan as fast as their uniform densities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import sptc
from bench.quality.tasks import Inputs
from bench.quality.variants import EQUAL_SPEED
from sptc.config import Config
from sptc.plans.budget import PlanError, replan


@dataclass(frozen=True)
class Planned:
    """A plan, and what it is to be compared with: the same measurements of the same batch at uniform densities."""

    plan: sptc.Plan
    uniform: sptc.Plan

    def to_dict(self) -> dict[str, Any]:
        """What was chosen, and what is predicted of both."""
        return {
            "densities": {region.key: region.density for region in self.plan.regions},
            "speedup": self.plan.speedup,
            "error": self.plan.error,
            "uniform_speedup": self.uniform.speedup,
            "uniform_error": self.uniform.error,
        }

    def __str__(self) -> str:
        return f"{self.plan}\nuniform densities: {self.uniform.speedup:.2f}x, output off by {self.uniform.error:.2g}"


def prepare(objective: nn.Module, batch: Inputs, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Planned | None]:
    """Prepare the objective if its options have trained state; returns the options to compile with, and the plan if one was made.

    The plan's file is in `folder`.

    Every region gets its state first, so that what is measured for the plan is what runs; the router of an FFN that it keeps dense idles.

    Raises:
        PlanError: no plan is as fast as the uniform densities, or these are not predicted to be faster than dense.
        ValueError: the uniform densities are not among those that plans are made of.
    """
    uniform = {key: value for key, value in options.items() if options.get("plan") != EQUAL_SPEED or key != "plan"}
    config = Config.from_options(uniform)
    if config.ffn_selector == "router" or config.attention_selector == "pq":
        sptc.prepare(objective, batch, uniform)
    if uniform == options:
        return options, None
    if config.ffn_density == "auto":
        raise PlanError("a plan as fast as uniform densities needs them: give ffn.density")
    measured = sptc.plan(objective, batch, max_error=0.0, options=uniform)
    same = measured.uniform(config.attention_density, config.ffn_density)
    made = Planned(replan(measured, speedup=same.speedup), same)
    path = folder / "plan.json"
    made.plan.save(path)
    return {**uniform, "plan": str(path)}, made
