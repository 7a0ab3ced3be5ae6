"""What one emitted kernel is: a template, the constants bound in it, the expressions written into it. Plain values, hashable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Constant = bool | int | float | str


@dataclass(frozen=True)
class KernelSpec:
    """One kernel, fully determined: equal specs give equal source.

    `template` names a file of `codegen/triton/templates` and the `@triton.jit` function of that name in it. `constants` has a value for
    each of its `tl.constexpr` parameters. `hooks` gives the expressions behind the functions that a template leaves open: "predicate"
    (canonical text of `sptc/ir/predicate.py`), "transform" (of `sptc/ir/expression.py`). `num_warps` and `num_stages` are Triton's.
    """

    template: str
    constants: tuple[tuple[str, Constant], ...]
    hooks: tuple[tuple[str, str], ...] = ()
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(
        cls,
        template: str,
        constants: Mapping[str, Constant],
        hooks: Mapping[str, str] | None = None,
        num_warps: int = 4,
        num_stages: int = 2,
    ) -> KernelSpec:
        """A spec from mappings, in sorted order."""
        return cls(template, tuple(sorted(constants.items())), tuple(sorted((hooks or {}).items())), num_warps, num_stages)
