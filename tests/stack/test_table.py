"""docs/stack.md: made from results, complete, and in step with the cells."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stack.matrix import Cell
from tests.stack.table import IncompleteError, page

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "stack.md"
CELL = {
    "group": "Loops",
    "name": "a | b",
    "order": 1,
    "outcome": "passed",
    "rewritten": "2 ffn",
    "compiles": 3,
    "error": 2.5e-7,
    "says": ["ffn: why"],
}


def results(folder: Path, *cells: dict[str, Any]) -> str:
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    return str(path)


def test_a_row_for_each_cell_in_the_order_of_the_suite(tmp_path: Path) -> None:
    other = {"group": "Loops", "name": "first", "order": 0, "outcome": "passed", "verdict": "an error", "says": ["a sentence"]}
    rows = [line for line in page(results(tmp_path, CELL, other)).splitlines() if line.startswith("| ")]
    assert rows[1:] == ["| first | an error |  |  |  | a sentence |", "| a \\| b | works | 2 ffn | 3 | 2e-07 | ffn: why |"]


def test_some_cells_replace_their_rows_and_leave_the_others(tmp_path: Path) -> None:
    first, last = ({**CELL, "name": name, "order": order} for name, order in (("first", 0), ("last", 2)))
    other, changed = {**CELL, "group": "Other"}, {**CELL, "compiles": 4}
    want = page(results(tmp_path, first, changed, last, other))
    for before in (page(results(tmp_path, first, *had, last, other)) for had in ([], [CELL])):
        assert page(results(tmp_path, changed), before) == want


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_no_page_of_a_run_that_did_not_pass(outcome: str, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match=f"Loops: other \\({outcome}\\)"):
        page(results(tmp_path, CELL, {"group": "Loops", "name": "other", "order": 2, "outcome": outcome}))


def named() -> Iterator[str]:
    """The cells of all modules here: those of tables, and tests that are one."""
    for path in sorted(HERE.glob("test_*.py")):
        for value in vars(importlib.import_module(f"tests.stack.{path.stem}")).values():
            if isinstance(value, tuple):
                yield from (cell.name for cell in value if isinstance(cell, Cell))
            marks = list(getattr(value, "pytestmark", ()))
            marks += (
                [mark for row in value for mark in row.marks] if isinstance(value, list) and value and hasattr(value[0], "marks") else []
            )
            yield from (mark.args[1] for mark in marks if mark.name == "cell")


def test_every_cell_is_on_the_page() -> None:
    text = PAGE.read_text()
    names = list(named())
    assert len(names) > 60
    missing = [name for name in names if f"\n| {name.replace('|', chr(92) + '|')} | " not in text]
    assert not missing, f"make test-stack stack-table writes them: {missing}"
