"""Which gradients of the routed FFN are wanted, on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """Which gradients are wanted; the order is that of `sptc::routed_ffn_backward`'s `need`."""

    x: bool
    up: tuple[bool, ...]
    up_bias: tuple[bool, ...]
    low: tuple[bool, ...]
    up_B: tuple[bool, ...]
    down: bool
    down_A: bool
    scale: bool

    @classmethod
    def read(cls, need: Sequence[bool], ups: int, biases: int, adapters: int) -> Need:
        """Raises ValueError if `need` has not one entry for each gradient."""
        if len(need) != ups + biases + 2 * adapters + 4:
            raise ValueError(f"need has {len(need)} entries, expected {ups + biases + 2 * adapters + 4}")
        flags = iter(need)

        def take(n: int) -> tuple[bool, ...]:
            return tuple(next(flags) for _ in range(n))

        return cls(next(flags), take(ups), take(biases), take(adapters), take(adapters), next(flags), next(flags), next(flags))
