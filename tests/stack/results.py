"""What a cell hands to the table: properties of its test, which the plugin in conftest.py writes down as a line of JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tests.stack.matrix import Facts


def record(record_property: Callable[[str, object], None], facts: Facts) -> None:
    for name, value in asdict(facts).items():
        record_property(name, value)


def record_verdict(record_property: Callable[[str, object], None], verdict: str, *says: Any) -> None:
    """Of a cell that does not train: a word ("works", "an error") and the sentences that a user sees."""
    record_property("verdict", verdict)
    record_property("says", says)
