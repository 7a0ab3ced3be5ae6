"""The mask operands of one call as kernels take them: constants and hooks of the spec, arguments of the launch.

A template that reads a mask declares

    T: many("TENSORS"), T_STRIDE: many("STRIDES"), S: many("SIZES"),
    mask_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    bias_ptr, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,

and the constants of `KernelMask.constants` that it needs. A bool mask and a bias have stride 0 along axes that they are broadcast over.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sptc.codegen.triton.run.launch import Argument
from sptc.codegen.triton.spec import Constant
from sptc.ir.predicate import Predicate, parse


@dataclass(frozen=True)
class KernelMask:
    """The mask of a call whose scores are [b, h, n, m] = `shape`. `boolean` and `bias` are None or broadcastable to it."""

    predicate: str
    tensors: Sequence[Tensor]
    sizes: Sequence[int]
    boolean: Tensor | None
    bias: Tensor | None
    shape: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        """Raises PredicateError unless tensors and sizes are those that the predicate names."""
        self.parsed.check(self.tensors, self.sizes)

    @functools.cached_property
    def parsed(self) -> Predicate:
        return parse(self.predicate)

    @property
    def reads_tensors(self) -> bool:
        """Whether some conjunct reads a tensor: `holds_throughout` and `holds_nowhere` do not speak for those."""
        return self.parsed.tensor_count > 0

    @property
    def by_range(self) -> bool:
        """Whether some conjunct reads none, so that `holds_throughout` and `holds_nowhere` may decide whole rectangles."""
        return any(conjunct.tensor_count == 0 for conjunct in self.parsed.conjuncts)

    def constants(self) -> dict[str, Constant]:
        """Constants of the spec.

        - TENSORS, STRIDES, SIZES: how many runtime parameters the predicate has; PREDICATE: it is not "True".
        - READS_TENSORS, BY_RANGE: the properties above.
        - MASK, BIAS: the operand is given; MASK_BY_HEAD, MASK_BY_QUERY, BIAS_BY_HEAD, BIAS_BY_QUERY: it may differ along that axis.
        - BIAS_LEAST: bias values up to it mean masked.
        """
        boolean, bias = self._expanded(self.boolean), self._expanded(self.bias)
        return {
            "TENSORS": self.parsed.tensor_count,
            "STRIDES": len(self._tensor_strides()),
            "SIZES": self.parsed.size_count,
            "PREDICATE": bool(self.parsed.conjuncts),
            "READS_TENSORS": self.reads_tensors,
            "BY_RANGE": self.by_range,
            "MASK": boolean is not None,
            "MASK_BY_HEAD": boolean is not None and bool(boolean.stride(1) != 0),
            "MASK_BY_QUERY": boolean is not None and bool(boolean.stride(2) != 0),
            "BIAS": bias is not None,
            "BIAS_BY_HEAD": bias is not None and bool(bias.stride(1) != 0),
            "BIAS_BY_QUERY": bias is not None and bool(bias.stride(2) != 0),
            "BIAS_LEAST": 0.0 if bias is None else max(torch.finfo(bias.dtype).min, torch.finfo(torch.float32).min),
        }

    def hooks(self) -> dict[str, str]:
        return {"predicate": str(self.parsed)}

    def arguments(self) -> dict[str, Argument]:
        """What the parameters of the module's docstring are at this call; nothing for an operand that is not given."""
        values: dict[str, Argument] = {f"T_{i}": tensor for i, tensor in enumerate(self.tensors[: self.parsed.tensor_count])}
        values |= {f"T_STRIDE_{i}": stride for i, stride in enumerate(self._tensor_strides())}
        values |= {f"S_{i}": size for i, size in enumerate(self.sizes[: self.parsed.size_count])}
        return values | self._operand("mask", self.boolean) | self._operand("bias", self.bias)

    def _operand(self, name: str, operand: Tensor | None) -> dict[str, Argument]:
        if operand is None:
            return {}
        values: dict[str, Argument] = {f"{name}_ptr": operand}
        return values | {f"{name}_stride_{axis}": stride for axis, stride in zip("bhqk", operand.expand(self.shape).stride(), strict=True)}

    def _expanded(self, operand: Tensor | None) -> Tensor | None:
        return None if operand is None else operand.expand(self.shape)

    def _tensor_strides(self) -> list[int]:
        """Strides of t0's axes, then t1's, ...: none for a tensor that the predicate passes over."""
        named = {element.position for element in self.parsed.elements}
        return [stride for i, tensor in enumerate(self.tensors) if i in named for stride in tensor.stride()]
