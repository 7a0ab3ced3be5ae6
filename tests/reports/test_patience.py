"""A line on a terminal while something takes long, and nothing anywhere else."""

from __future__ import annotations

import io
import time

import pytest

from sptc.reports import patience


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "says"), [(Terminal(), True), (io.StringIO(), False)])
def test_only_a_terminal_shows_what_takes_long(monkeypatch, stream, says):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(patience, "_SILENT_SECONDS", 0.05)
    with patience.shown("compiles"):
        time.sleep(0.3)
    assert ("sptc: compiles, 0 s" in stream.getvalue()) is says
    assert not says or stream.getvalue().endswith("\r")  # the line is gone


def test_what_is_soon_over_shows_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    with patience.shown("compiles"):
        pass
    assert stream.getvalue() == ""


def test_other_ranks_show_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    monkeypatch.setattr(patience, "_SILENT_SECONDS", 0.0)
    monkeypatch.setattr(patience, "is_first_rank", lambda: False)
    with patience.shown("compiles"):
        time.sleep(0.1)
    assert stream.getvalue() == ""
