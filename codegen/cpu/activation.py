"""An activation as a C++ library: forward and backward in one pass over memory each, the router's scale included."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sptc.codegen.cpu.compiler import REAL, library
from sptc.codegen.expr import program
from sptc.codegen.infix import Dialect, printed
from sptc.expression import MAX_UPS, parse

_DIALECT = Dialect(number="REAL({!r})".format, assign="const Vector {} = {};".format, full="spread({1})".format)
_SOURCE = """#include "activation.h"

// {text}
extern "C" void forward(const Call* call) {{
    forward_rows<{ups}>(*call, [](const Vector* u, Vector& value_out) {{
        {inputs}
        {forward}
    }});
}}

extern "C" void backward(const Call* call) {{
    backward_rows<{ups}>(*call, [](Vector grad, const Vector* u, Vector& value_out, Vector* grads_out) {{
        {inputs}
        {backward}
    }});
}}
"""


class _Call(ctypes.Structure):
    """`Call` of native/activation.h."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("u", ctypes.c_void_p * MAX_UPS),
        ("u_row", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("grad_u", ctypes.c_void_p * MAX_UPS),
        ("grad_scale", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Activation:
    """scale * act(u0, ...) and its gradients, in one thread. Tensors are [n, width], rows of adjacent elements, all of one dtype.

    `scale`, [n] of that dtype, is a factor of each row; None: 1.
    """

    text: str
    library: ctypes.CDLL

    def forward(self, us: Sequence[Tensor], scale: Tensor | None, out: Tensor) -> None:
        """out = scale * act(us); `out` is contiguous, and none of `us`."""
        call = self._call(us, scale)
        call.value = out.data_ptr()
        self.library.forward(ctypes.byref(call))

    def backward(
        self, us: Sequence[Tensor], scale: Tensor | None, grads: Sequence[Tensor], value: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        """Turn the gradient in scale * act(us), which the first of `grads` holds, into those in each u, one of `grads` each.

        Args:
            grads: contiguous, as many as `us`.
            value: contiguous, is filled with act(us), without the scale.
            grad_scale: [n] of adjacent elements, is filled with the gradient in `scale`.
        """
        call = self._call(us, scale)
        call.value = None if value is None else value.data_ptr()
        call.grad = grads[0].data_ptr()
        call.grad_u[: len(grads)] = [grad.data_ptr() for grad in grads]
        call.grad_scale = None if grad_scale is None else grad_scale.data_ptr()
        self.library.backward(ctypes.byref(call))

    def _call(self, us: Sequence[Tensor], scale: Tensor | None) -> _Call:
        rows, width = us[0].shape
        call = _Call(rows=rows, width=width, u_row=us[0].stride(0), scale=None if scale is None else scale.data_ptr())
        call.u[: len(us)] = [u.data_ptr() for u in us]
        return call


@functools.lru_cache(maxsize=256)
def compile_activation(text: str, dtype: torch.dtype) -> Activation:
    """The activation of a canonical text, for tensors of `dtype`.

    Raises:
        ExpressionError: `text` is no activation.
        CompilerError: as `library`.
    """
    return Activation(text, library(activation_source(text), {**REAL[dtype], "MOST": str(MAX_UPS)}))


def activation_source(text: str) -> str:
    """C++ for a canonical text: `forward` and `backward` over a `Call` of native/activation.h.

    Raises:
        ExpressionError: `text` is no activation.
    """
    arity = parse(text).arity
    value, both = program(text, value=True), program(text, value=True, gradients=True)
    indent = "\n        "

    def body(lines: Sequence[str], outputs: Sequence[str], names: Sequence[str]) -> str:
        return indent.join([*lines, *(f"{name} = {output};" for name, output in zip(names, outputs, strict=True))])

    return _SOURCE.format(
        text=text,
        ups=arity,
        inputs=indent.join(f"const Vector u{i} = u[{i}];" for i in range(arity)),
        forward=body(*printed(value, _DIALECT), ["value_out"]),
        backward=body(*printed(both, _DIALECT), ["value_out", *(f"grads_out[{i}]" for i in range(arity))]),
    )
