"""Choices of tokens and hidden units."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sptc.codegen.ops  # noqa: F401
from sptc.codegen.ops.units import sample_size

ops = torch.ops.sptc


def mask_of(*true: int, size: int = 40) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(true, dtype=torch.int64), True)


@pytest.mark.parametrize("true", [(), (3,), (0, 7, 39), tuple(range(40))])
def test_split_holds_every_row_once(true: tuple[int, ...]) -> None:
    counted, context = ops.split_tokens(mask_of(*true))
    assert counted.tolist() == list(true) and context.tolist() == [i for i in range(40) if i not in true]


@pytest.mark.parametrize("size", [256, 1000, 4096])
def test_rows_are_added_up_to_one_of_16_shares(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shares = {math.ceil(i * size / 16) for i in range(17)}
    for share in (0.0, 0.001, 0.3, 0.31, 0.9, 1.0):
        mask, spare = torch.rand(size, generator=generator) < share, torch.rand(size, generator=generator) < 0.5
        found = ops.in_steps(mask, spare)
        added = found & ~mask
        assert bool((found & mask).equal(mask)) and not (added & ~spare).any() and int(added.sum()) <= size / 16 + 1
        assert int(found.sum()) in shares or torch.equal(found, mask | spare)  # all that there were
        assert int(ops.in_steps(mask, ~mask).sum()) in shares
    assert torch.equal(ops.in_steps(mask_of(3), mask_of(4)), mask_of(3))  # few tokens: as they are


@pytest.mark.parametrize("size", [1, 40, 5000])
def test_a_sample_is_spread_evenly_over_the_rows_of_a_mask(size: int) -> None:
    x = torch.randn(size, 3)
    for true in (range(size), range(0, size, 3), [size - 1]):
        mask = mask_of(*true, size=size)
        sample = ops.sample_tokens(x, mask)
        assert len(sample) == sample_size(size) and mask[sample].all() and sample.tolist() == sorted(sample.tolist())
        times = sample.bincount(minlength=size)[mask]
        assert times.max() - times.min() <= 1
    assert torch.equal(ops.sample_tokens(x, None), ops.sample_tokens(x, torch.ones(size, dtype=torch.bool)))
    assert torch.equal(ops.sample_tokens(x, None), ops.sample_tokens(x, torch.zeros(size, dtype=torch.bool)))  # none: all


def test_units_of_the_largest_energy_in_order() -> None:
    energy = torch.tensor([1.0, 5.0, 0.0, 7.0, 2.0])
    assert ops.choose_units(energy, 3).tolist() == [1, 3, 4]
    assert ops.choose_units(energy, 5).tolist() == [0, 1, 2, 3, 4]
    assert 2 in ops.choose_units(energy.index_fill(0, torch.tensor(2), torch.nan), 1)


def test_a_linear_map_is_the_ridge_regression_of_its_rank() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 16, dtype=torch.float64)
    y = x @ torch.randn(16, 3, dtype=torch.float64) @ torch.randn(3, 10, dtype=torch.float64)
    gram = x @ x.t()
    expected = gram @ torch.linalg.solve(gram + 0.3 * gram.diagonal().mean() * torch.eye(12, dtype=x.dtype), y)
    a, b = ops.fit_linear(x, y, 3)
    torch.testing.assert_close(x @ a.t() @ b.t(), expected)
    few = ops.fit_linear(x, y, 2)
    assert 0 < (x @ few[0].t() @ few[1].t() - expected).norm() < expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_map_of_rows_that_tell_nothing(dtype: torch.dtype) -> None:
    """Rows that are not finite have no say; of none, and of zeros, the map gives zeros."""
    x, y = torch.randn(6, 8, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    expected = ops.fit_linear(torch.cat([x, torch.zeros(1, 8, dtype=dtype)]), torch.cat([y, torch.zeros(1, 5, dtype=dtype)]), 2)
    for row, other in ((torch.nan, 1.0), (1.0, torch.inf)):
        got = ops.fit_linear(
            torch.cat([x, torch.full((1, 8), row, dtype=dtype)]), torch.cat([y, torch.full((1, 5), other, dtype=dtype)]), 2
        )
        torch.testing.assert_close(got, expected)
    for rows in (x[:0], torch.zeros_like(x)):
        a, b = ops.fit_linear(rows, y[: len(rows)], 2)
        assert a.dtype == b.dtype == dtype and not (x @ a.t() @ b.t()).any()


@pytest.mark.parametrize(
    "op, arguments",
    [
        (ops.sample_tokens, (torch.randn(40, 3), mask_of(2, 5))),
        (ops.sample_tokens, (torch.randn(40, 3), None)),
        (ops.choose_units, (torch.randn(9), 4)),
        (ops.fit_linear, (torch.randn(5, 8), torch.randn(5, 6), 3)),
        (ops.fit_linear, (torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64), 3)),
        (ops.in_steps, (mask_of(2, 5), mask_of(1))),
        (ops.in_steps, (mask_of(2, 5, size=300), mask_of(1, size=300))),
    ],
)
def test_opcheck(op, arguments) -> None:
    torch.library.opcheck(op.default, arguments)


def test_the_fake_of_a_split_has_sizes_that_only_data_tell() -> None:
    torch.library.opcheck(ops.split_tokens.default, (mask_of(1, 2),), test_utils=("test_schema", "test_faketensor"))
