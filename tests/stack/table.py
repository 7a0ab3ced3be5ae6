"""docs/stack.md, made of the lines that a run of the cells wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HEAD = """# What works with what

Made by `make test-stack` and `make stack-table` from what each cell found; not edited by hand. A cell is a training script on a model of
two layers, on a CPU. It runs eagerly, compiled at density 1, and compiled sparse, and asserted of it is:

- regions are rewritten, as many as the table says, in the graphs that train;
- the loss falls, and every trained tensor moves;
- at density 1 the gradients of the first step are those of eager mode (of one process): the table has the largest error, relative to the
  largest gradient of the parameter, or to a hundredth of the model's;
- the table's number of graphs is within the bound of the cell, and Dynamo's recompile limit is not met but where a sentence says so.

A cell that does not train says what a user sees. Sentences are those of the report, or of the error.
"""
COLUMNS = ("", "outcome", "regions rewritten", "graphs", "error at density 1", "what sptc says")
_HEADER = "| " + " | ".join(COLUMNS) + " |"


class IncompleteError(ValueError):
    """A cell failed or was skipped: there is nothing to write down."""


def page(results: str, before: str = "") -> str:
    """The page, from the results of a whole run, or of some cells.

    Args:
        before: the text of the page that has the rows of all other cells.

    Raises:
        IncompleteError: a cell has not passed.
    """
    cells = [json.loads(line) for line in Path(results).read_text().splitlines()]
    bad = [f"{cell['group']}: {cell['name']} ({cell['outcome']})" for cell in cells if cell["outcome"] != "passed"]
    if bad:
        raise IncompleteError("these cells did not pass: " + "; ".join(bad))
    groups = _rows_of(before)
    new: dict[tuple[str, str], list[str]] = {}
    for cell in sorted(cells, key=lambda cell: cell["order"]):
        row, name = "| " + " | ".join(_escaped(text) for text in _row(cell)) + " |", _escaped(cell["name"])
        names = groups.setdefault(cell["group"], [])
        if (cell["group"], name) not in new:
            names[:] = [(other, lines) for other, lines in names if other != name]
            names.insert(cell["order"], (name, new.setdefault((cell["group"], name), [])))
        new[cell["group"], name].append(row)
    return HEAD + "".join(f"\n## {group}\n\n{_table(names)}\n" for group, names in sorted(groups.items()))


def _rows_of(text: str) -> dict[str, list[tuple[str, list[str]]]]:
    """The rows of a page by group and, in their order, by cell."""
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for section in text.split("\n## ")[1:]:
        group, *lines = section.splitlines()
        by_name: dict[str, list[str]] = {}
        for line in lines:
            if line.startswith("| ") and not line.startswith(_HEADER):
                by_name.setdefault(line[2 : line.index(" | ")], []).append(line)
        groups[group] = list(by_name.items())
    return groups


def _table(names: list[tuple[str, list[str]]]) -> str:
    lines = [_HEADER, "|" + "---|" * len(COLUMNS), *(line for _, lines in names for line in lines)]
    return "\n".join(dict.fromkeys(lines))  # a cell of several tests that found the same is one row


def _row(cell: dict[str, Any]) -> tuple[str, ...]:
    error, rewritten = cell.get("error"), cell.get("rewritten", "")
    dense = rewritten and all(count == "0" for count in re.findall(r"\d+", rewritten))
    return (
        cell["name"],
        cell.get("verdict", "trains, all of it dense" if dense else "works"),
        rewritten,
        str(cell.get("compiles", "")),
        "" if error is None else f"{error:.0e}",
        "; ".join(cell.get("says", ())),
    )


def _escaped(text: str) -> str:
    """On one line, with bars escaped, and without addresses in memory, which no two runs share."""
    return re.sub(r"\b\d{12,}\b", "...", " ".join(text.split())).replace("|", "\\|")
