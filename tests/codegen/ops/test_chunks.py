"""A function of rows in chunks: values and gradients are those of all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sptc.codegen.ops  # noqa: F401
from sptc.ir.program import Call, Program, Value

ops = torch.ops.sptc

# y = x w^T + b, and what its gradient gives x, w and b.
FORWARD = str(Program((Call("t.default", (Value(1),), {}), Call("addmm.default", (Value(2), Value(0), Value(3)), {})), (4,)))
BACKWARD = str(
    Program(
        (
            Call("mm.default", (Value(0), Value(2)), {}),
            Call("t.default", (Value(0),), {}),
            Call("mm.default", (Value(5), Value(1)), {}),
            Call("sum.dim_IntList", (Value(0), [0]), {}),
        ),
        (4, 6, 7),
    )
)


def operands(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=generator, dtype=dtype) for size in ((rows, 5), (7, 5), (7,)))
    return x, w, b


def linear(x: Tensor, w: Tensor, b: Tensor, chunk: int) -> Tensor:
    return ops.in_chunks([x], [w, b], FORWARD, BACKWARD, 7, x.dtype, chunk, [True, True, True])


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
@pytest.mark.parametrize("rows", [0, 1, 11])
def test_values_and_gradients(rows: int, chunk: int) -> None:
    given = [x.requires_grad_() for x in operands(rows)]
    grad = torch.randn(rows, 7, dtype=torch.float64)
    got, want = linear(*given, chunk), torch.nn.functional.linear(*given)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, given, grad), torch.autograd.grad(want, given, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_sums_over_chunks_of_16_bits_are_wide() -> None:
    x, w, b = operands(4096, torch.bfloat16)
    *_, of_b = ops.in_chunks_backward(torch.ones(4096, 7, dtype=torch.bfloat16), [x], [w, b], BACKWARD, 1, [True, True, True])
    assert of_b.dtype == torch.bfloat16 and of_b.tolist() == [4096.0] * 7, "in 16 bits a sum of ones ends at 256"


def test_what_is_not_needed_is_empty() -> None:
    x, w, b = operands(11)
    program = str(Program((Call("mm.default", (Value(0), Value(2)), {}),), (4,)))
    found = ops.in_chunks_backward(torch.ones(11, 7, dtype=torch.float64), [x], [w, b], program, 4, [True, False, False])
    torch.testing.assert_close(found[0], torch.ones(11, 7, dtype=torch.float64) @ w)
    assert [tuple(g.shape) for g in found[1:]] == [(0,), (0,)]


def test_a_gradient_that_no_program_computes_is_an_error() -> None:
    x, w, b = operands(11)
    with pytest.raises(AssertionError, match=r"operands \[1\] are asked for"):
        ops.in_chunks([x], [w.requires_grad_(), b], FORWARD, "", 7, x.dtype, 4, [True, False, False])


def test_opcheck() -> None:
    x, w, b = (x.requires_grad_() for x in operands(11))
    need = [True, True, True]
    torch.library.opcheck(ops.in_chunks.default, ([x], [w, b], FORWARD, BACKWARD, 7, torch.float64, 4, need))
    grad = torch.randn(11, 7, dtype=torch.float64)
    torch.library.opcheck(ops.in_chunks_backward.default, (grad, [x.detach()], [w.detach(), b.detach()], BACKWARD, 4, need))
