"""A mask predicate as a C++ function that fills in whether queries q, q + 1, ... may see a key: the `Fill` of native/attention.cpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sptc.codegen.cpu.compiler import library
from sptc.ir.condition import Binary, Element, Expression, Index, Literal, Not, Size
from sptc.ir.predicate import Predicate

_TYPES = {
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.float32: "float",
    torch.float64: "double",
}
_FUNCTIONS = {"//": "quotient", "%": "remainder_of"}
_SOURCE = """#include <cmath>
#include <cstdint>
#include <type_traits>

typedef int64_t i64;

// Rounds down. By 0 it is 0 for integers: a division that a mask never gets to must not end the process.
template <class A, class B>
static inline auto quotient(A a, B b) {{
    if constexpr (std::is_integral_v<A> && std::is_integral_v<B>)
        return b == 0 ? i64(0) : i64(a / b - (a % b != 0 && (a < 0) != (b < 0)));
    else
        return std::floor(a / b);
}}
template <class A, class B>
static inline auto remainder_of(A a, B b) {{ return a - b * quotient(a, b); }}

// {text}
extern "C" void fill(const i64* x, i64 b, i64 h, i64 first, i64 rows, i64 k, uint8_t* out) {{
    for (i64 i = 0; i < rows; i++) {{
        const i64 q = first + i;
        out[i] = {condition};
    }}
}}
"""


@dataclass(frozen=True)
class Fill:
    """A compiled predicate with its operands. Keep it alive while `function` runs on `operands`."""

    function: Any  # a ctypes function
    operands: Any  # a ctypes array of int64: pointers of the tensors, their strides, the sizes
    tensors: tuple[Tensor, ...]


def fill(predicate: Predicate, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Fill:
    """`predicate` for these operands, compiled when it is first met."""
    kept = tuple(t if t.dtype in _TYPES else t.float() for t in tensors)
    function = _compiled(predicate, tuple((t.dtype, t.dim()) for t in kept))
    values = [t.data_ptr() for t in kept] + [stride for t in kept for stride in t.stride()] + [int(size) for size in sizes]
    return Fill(function, (ctypes.c_int64 * max(1, len(values)))(*values), kept)


@functools.lru_cache(maxsize=1024)
def _compiled(predicate: Predicate, kinds: tuple[tuple[torch.dtype, int], ...]) -> Any:
    condition = _Writer(kinds).truth(predicate.tree)
    return library(_SOURCE.format(text=predicate, condition=condition), {}).fill


@dataclass(frozen=True)
class _Writer:
    kinds: tuple[tuple[torch.dtype, int], ...]  # dtype and rank of each tensor

    def truth(self, tree: Expression) -> str:
        """C++ for `tree` as a condition, 0 or 1."""
        match tree:
            case Literal(value):
                return str(int(bool(value)))
            case Element():
                return f"({self.number(tree)} != 0)"
            case Not(operand):
                return f"!{self.truth(operand)}"
            case Binary(operator, left, right) if tree.logical:
                return f"({self.truth(left)} {operator} {self.truth(right)})"
            case Binary(operator, left, right):
                return f"({self.number(left)} {operator} {self.number(right)})"
        raise AssertionError(f"{tree} is no condition")

    def number(self, tree: Expression) -> str:
        """C++ for `tree` as a number; a condition counts as 0 or 1."""
        match tree:
            case Literal(value):
                return f"i64({int(value)})"
            case Index(name):
                return name
            case Size(position):
                return f"x[{len(self.kinds) + sum(rank for _, rank in self.kinds) + position}]"
            case Element(position, indices):
                start = len(self.kinds) + sum(rank for _, rank in self.kinds[:position])
                terms = [f"{self.number(index)} * x[{start + axis}]" for axis, index in enumerate(indices)]
                dtype = self.kinds[position][0]
                element = f"((const {_TYPES[dtype]}*)x[{position}])[{' + '.join(terms) or 0}]"
                return element if dtype.is_floating_point else f"i64({element})"
            case Binary(operator, left, right) if operator in "+-*":
                return f"({self.number(left)} {operator} {self.number(right)})"
            case Binary("//" | "%" as operator, left, right):
                return f"{_FUNCTIONS[operator]}({self.number(left)}, {self.number(right)})"
        return f"i64({self.truth(tree)})"
