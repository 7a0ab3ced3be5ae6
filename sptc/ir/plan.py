"""A plan: the density of each region of a model, as a readable JSON file and a table. `sptc.plan` (sptc/plans/planning.py) makes one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sptc.config import Config, ConfigError
from sptc.device.cache import write_whole

DENSITIES = {"attention": (1 / 2, 1 / 4, 1 / 8, 1 / 16), "ffn": (3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)}
"""What is tried of a region of each kind, besides dense."""

VERSION = 2


@dataclass(frozen=True)
class Choice:
    """One density that a region was tried at, everything else dense."""

    density: float
    seconds: float  # predicted, of the region in one step
    error: float  # measured, relative, of the model's output
    kept: float = 0.0  # bytes, predicted, that it keeps for backward
    lean: bool = False  # exact, in the form that keeps less for backward: hidden values computed again, attention's scores never whole


@dataclass(frozen=True)
class PlannedRegion:
    """One region by its key (passes/decide/planned.py), its choices from dense (density 1) down, and the density that was chosen."""

    key: str
    graphs: tuple[int, ...]  # which of the captured graphs hold it
    facts: Mapping[str, int]  # sizes that it must still have when the plan is applied
    density: float
    choices: tuple[Choice, ...]
    lean: bool = False  # of the choice at that density
    apart: bool = False  # densities are of tokens whose label does not count; the others of an FFN keep all

    @property
    def kind(self) -> str:
        """As in its key: "attention" or "ffn"."""
        return self.key.rpartition(":")[2].rstrip("0123456789")

    @property
    def chosen(self) -> Choice:
        return {(choice.density, choice.lean): choice for choice in self.choices}[self.density, self.lean]

    @property
    def dense(self) -> Choice:
        """What it costs where nothing is left out and nothing kept less, as far as options allow."""
        return self.choices[0]

    @property
    def dense_seconds(self) -> float:
        return self.dense.seconds

    def at(self, choice: Choice) -> PlannedRegion:
        """The region with this choice."""
        return replace(self, density=choice.density, lean=choice.lean)


@dataclass(frozen=True)
class Plan:
    """Densities for one model. `options={"plan": plan}` applies it, or the file that it is saved to; `str(plan)` is a table."""

    target: Mapping[str, float]  # {"speedup": 1.5}, {"max_error": 0.05}, {"max_memory": 2e9} or {"max_rise": 0.01}
    options: Mapping[str, Any]  # those that it was made with and is to be used with
    other_seconds: float  # predicted, of everything outside the regions
    regions: tuple[PlannedRegion, ...]
    losses_kept: float = 0.0  # bytes, predicted, that losses keep for backward: no choice changes that
    loss: float | None = None  # of the dense model on the batch, where squares of errors are what this rises by

    @property
    def dense_seconds(self) -> float:
        return self.other_seconds + math.fsum(region.dense_seconds for region in self.regions)

    @property
    def seconds(self) -> float:
        return self.other_seconds + math.fsum(region.chosen.seconds for region in self.regions)

    @property
    def speedup(self) -> float:
        """Predicted, of forward and backward."""
        return self.dense_seconds / self.seconds

    @property
    def kept(self) -> float:
        """Bytes, predicted, that attention, FFNs and losses keep for backward: the total of "MB kept" in a report."""
        return self.losses_kept + math.fsum(region.chosen.kept for region in self.regions)

    @property
    def dense_kept(self) -> float:
        return self.losses_kept + math.fsum(region.dense.kept for region in self.regions)

    @property
    def error(self) -> float:
        """Predicted from those of the regions."""
        return combined(region.chosen.error for region in self.regions)

    @property
    def rise(self) -> float | None:
        """What the loss is predicted to rise by before training, where that was measured."""
        return None if self.loss is None else self.error**2

    def uniform(self, attention: float, ffn: float) -> Plan:
        """The same regions at one density for each kind: what a plan is worth is its difference to that.

        A region that has no choice there (it would not be faster than at a greater density, its output is not finite, or it is never
        sparse) gets its least choice above.

        Raises:
            ValueError: no region of a kind is tried at its density.
        """
        wanted = {"attention": attention, "ffn": ffn}
        for kind, density in wanted.items():
            if density not in (1.0, *DENSITIES[kind]):
                known = ", ".join(f"{d:.4g}" for d in DENSITIES[kind])
                raise ValueError(f"plans measure nothing of {kind} at density {density:g}, only at {known}")
        least = [min((c for c in r.choices if c.density >= wanted[r.kind] and not c.lean), key=lambda c: c.density) for r in self.regions]
        regions = tuple(region.at(choice) for region, choice in zip(self.regions, least, strict=True))
        return replace(self, target={}, regions=regions)

    def graphs(self) -> list[set[str]]:
        """The keys of the regions of each captured graph."""
        count = 1 + max((i for region in self.regions for i in region.graphs), default=-1)
        return [{region.key for region in self.regions if i in region.graphs} for i in range(count)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Plain data. What is derived stands beside what it derives from, for people."""
        summary: dict[str, float | None] = {
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "speedup": self.speedup,
            "error": self.error,
        }
        summary |= {"kept": self.kept, "dense_kept": self.dense_kept, "rise": self.rise}
        return {"version": VERSION, **asdict(self), "predicted": summary}

    @classmethod
    def load(cls, path: str | os.PathLike[str] | Mapping[str, Any]) -> Plan:
        """Read what `save` wrote, or what `to_dict` gave.

        Raises:
            ConfigError: there is no such file, or it holds no plan of this version.
        """
        named, data = "what was given", path
        if not isinstance(path, Mapping):
            named = repr(str(path))
            try:
                data = json.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"option 'plan': cannot read {named}: {getattr(error, 'strerror', None) or error}") from error
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            raise ConfigError(f"option 'plan': {named} is no plan of version {VERSION}; make one with sptc.plan")
        try:
            regions = tuple(_region(entry) for entry in data["regions"])
            return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data and f.name != "regions"}, regions=regions)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"option 'plan': {named} is not a whole plan ({error!r}); make it again with sptc.plan") from error

    def applied_to(self, config: Config) -> Config:
        """`config` with the options that the plan was made with.

        Raises:
            ConfigError: an option was given that says something else.
        """
        given = config.to_options()
        named = f" {config.plan!r}" if isinstance(config.plan, str) else ""
        for key, value in self.options.items():
            if given.get(key, value) != value:
                raise ConfigError(
                    f"option {key!r} is {given[key]!r}, but the plan{named} was made with {value!r}; "
                    "leave the option out, or make a plan with it"
                )
        return Config.from_options({**self.options, **given})

    def __str__(self) -> str:
        power = 1 if self.loss is None else 2  # a rise of the loss is the square
        rows = [
            (r.key, f"{r.density:.3g}", *_figures(r.dense_seconds, r.chosen.seconds, r.chosen.error**power, r.dense.kept, r.chosen.kept))
            for r in self.regions
        ]
        elsewhere = ("elsewhere", "", *_figures(self.other_seconds, self.other_seconds, None, self.losses_kept, self.losses_kept))
        total = ("total", "", *_figures(self.dense_seconds, self.seconds, self.error**power, self.dense_kept, self.kept))
        headers = ("region", "density", "ms dense", "ms planned", "error" if power == 1 else "rise", "MB kept", "planned")
        table = tabulate([*rows, elsewhere, total], headers, disable_numparse=True, colalign=_ALIGN)
        wanted = ", ".join(f"{name} {value:g}" for name, value in self.target.items())
        change = f"output off by {self.error:.2g}" if self.loss is None else f"the loss of {self.loss:.3g} rises by {self.error**2:.2g}"
        reached = f"{self.speedup:.2f}x by predicted times of forward and backward, {change}"
        reached += f", {self.kept / 1e6:.3g} MB kept for backward"
        return f"{table}\n\n{f'planned for {wanted}' if wanted else 'not planned'}: {reached}"


_ALIGN = ("left", *("right",) * 6)


def _figures(dense: float, planned: float, error: float | None, kept_before: float, kept_after: float) -> tuple[str, ...]:
    """Seconds as milliseconds, an error, bytes as megabytes."""
    seconds = f"{dense * 1e3:.3g}", f"{planned * 1e3:.3g}"
    return *seconds, "" if error is None else f"{error:.2g}", f"{kept_before / 1e6:.3g}", f"{kept_after / 1e6:.3g}"


def combined(errors: Iterable[float]) -> float:
    """The error of several regions at once: changes point anywhere, so their squares add."""
    return math.sqrt(math.fsum(e * e for e in errors))


def _region(entry: Mapping[str, Any]) -> PlannedRegion:
    choices = tuple(Choice(**choice) for choice in entry["choices"])
    apart = entry.get("apart", False)
    region = PlannedRegion(entry["key"], tuple(entry["graphs"]), entry["facts"], entry["density"], choices, entry["lean"], apart)
    if region.chosen.error < 0 or not 0 < region.density <= 1 or region.dense_seconds < 0 or region.chosen.kept < 0:
        raise ValueError(f"{region.key} has a negative figure")
    return region
