"""The size that a symbolic size had when it was captured, without a guard on it."""

try:
    from torch.fx.experimental.symbolic_shapes import optimization_hint
except ImportError:  # torch before 2.13 names it so
    from torch.fx.experimental.symbolic_shapes import hint_int as optimization_hint

__all__ = ["optimization_hint"]
