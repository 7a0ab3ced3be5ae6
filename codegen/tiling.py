"""Tile sizes, warps and stages of a template: a short table for each architecture, pruned by what a device holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from sptc.codegen.target import Target


class TilingError(ValueError):
    """No candidate of a table fits the device."""


@dataclass(frozen=True)
class Tiling:
    """One candidate: values of the tile constants of a template, and Triton's launch options."""

    constants: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, num_warps: int, num_stages: int, **constants: int) -> Tiling:
        return cls(tuple(sorted(constants.items())), num_warps, num_stages)

    def values(self) -> dict[str, int]:
        return {**dict(self.constants), "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Table:
    """The candidates of one template, best first.

    `candidates` goes by the name of a target ("sm_90"); "" serves all others. `shared_memory` (bytes of a program) and `registers` (32-bit
    ones of a thread) are expressions in the tile constants, `num_warps`, `num_stages`, `warp_size`, and the facts that `choose` is given.
    """

    template: str
    candidates: Mapping[str, tuple[Tiling, ...]]
    shared_memory: sympy.Expr
    registers: sympy.Expr

    def fitting(self, target: Target, **facts: int) -> list[Tiling]:
        """Candidates that fit `target`, best first."""
        rows = self.candidates.get(target.name, self.candidates[""])
        return [tiling for tiling in rows if self._fits(tiling, target, facts)]

    def choose(self, target: Target, **facts: int) -> Tiling:
        """The best candidate that fits.

        Raises:
            TilingError: none fits; names the template, the facts and the device's limits.
        """
        rows = self.fitting(target, **facts)
        if not rows:
            known = ", ".join(f"{key}={value}" for key, value in facts.items())
            raise TilingError(
                f"no tile sizes of kernel {self.template!r} fit {target.name} ({target.shared_memory} bytes of shared memory, "
                f"{target.registers} registers) with {known}"
            )
        return rows[0]

    def _fits(self, tiling: Tiling, target: Target, facts: Mapping[str, int]) -> bool:
        values = {**tiling.values(), "warp_size": target.warp_size, **facts}
        shared, registers = (
            int(expr.subs({symbol: values[symbol.name] for symbol in expr.free_symbols})) for expr in (self.shared_memory, self.registers)
        )
        return shared <= target.shared_memory and registers <= target.registers
