"""Sizes of tiles and arguments of tensors, for all launchers."""

from __future__ import annotations

from torch import Tensor

from sptc.codegen.triton.run.launch import Argument

SMALLEST = 16  # tl.dot takes no smaller matrices


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def side(size: int) -> int:
    """`size` as a side of a matrix product."""
    return max(SMALLEST, padded(size))


def strided(name: str, x: Tensor, axes: str) -> dict[str, Argument]:
    """Pointer and strides of x; `axes` names its first axes."""
    return {f"{name}_ptr": x} | {f"{name}_stride_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=False)}
