"""The grid on which `decline="auto"` is judged."""

import pytest

from bench.decisions import Attention, Counted, Result, Units, cases, measure

CASE = Units(64, 16, 64, "relu", 0.5, "fp32")


@pytest.mark.parametrize(
    ("dense", "sparse", "predicted", "verdict"),
    [(2.0, 1.0, 1.5, "right"), (2.0, 1.0, 0.5, "WRONG"), (1.0, 2.0, 0.9, "right"), (1.0, 2.0, 1.1, "WRONG"), (1.05, 1.0, 0.1, "even")],
)
def test_verdict(dense, sparse, predicted, verdict):
    assert Result(CASE, dense, sparse, predicted, 1.0).verdict == verdict


def test_grid():
    grid = list(cases())
    assert len(grid) == len({str(case) for case in grid}) == 66


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASE, Attention(1, 64, 2, 16, 0.125, "bf16"), Counted(256, 16, 64, "relu", "fp32")], ids=str)
def test_measure(case):
    result = measure(case, seconds=0.0)
    assert min(result.dense, result.sparse, result.predicted_dense, result.predicted_sparse) > 0
