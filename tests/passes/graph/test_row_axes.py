"""Which axes of a tensor are rows, followed through views."""

from __future__ import annotations

import pytest

from sptc.passes.graph.row_axes import viewed


@pytest.mark.parametrize(
    ("before", "after", "rows", "want"),
    [
        ((3, 13, 16), (39, 16), (0, 1), (0,)),
        ((39, 16), (3, 13, 2, 8), (0,), (0, 1)),
        ((3, 13, 16), (3, 13, 2, 8), (0, 1), (0, 1)),
        ((3, 2, 13, 8), (3, 2, 13, 8), (0, 2), (0, 2)),
        ((3, 2, 13, 8), (6, 13, 8), (0, 2), None),  # heads and batch merged
        ((3, 13, 16), (3, 208), (0, 1), None),  # tokens and features merged
        ((1, 13, 16), (13, 16), (1,), (0,)),
        ((13, 16), (1, 13, 1, 16), (0,), (1,)),
        ((13, 3, 16), (39, 16), (1, 0), None),  # in another order
    ],
)
def test_rows_through_views(before: tuple[int, ...], after: tuple[int, ...], rows: tuple[int, ...], want: tuple[int, ...] | None) -> None:
    assert viewed(before, after, rows) == want
