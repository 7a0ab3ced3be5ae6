"""The size that a symbolic size had when it was captured, or a plausible one if only data will tell it; without a guard on it."""

import torch

try:
    from torch.fx.experimental.symbolic_shapes import optimization_hint
except ImportError:  # torch 2.11 has no such function, and the one it has raises for a size that only data will tell
    from torch._inductor.config import unbacked_symint_fallback
    from torch.fx.experimental.symbolic_shapes import size_hint

    def optimization_hint(a: torch.SymInt | int, fallback: int | None = None) -> int:
        return size_hint(a, unbacked_symint_fallback if fallback is None else fallback)


__all__ = ["optimization_hint"]
