"""The size that a symbolic size had when it was captured, without a guard on it."""

try:
    from torch.fx.experimental.symbolic_shapes import optimization_hint
except ImportError:  # torch 2.11 names it so (and warns of its older name, hint_int)
    from torch.fx.experimental.symbolic_shapes import size_hint as optimization_hint

__all__ = ["optimization_hint"]
