"""A line on a terminal while something takes long: what it is and for how many seconds, gone when it ends. Nothing in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from sptc.reports.ranks import is_first_rank

_SILENT_SECONDS = 2.0


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Say `what` and count seconds on stderr, if that is a terminal, once the block has taken two of them."""
    if not (sys.stderr.isatty() and is_first_rank()):
        yield
        return
    over = threading.Event()
    # What takes long gives no sign in between, so that another thread has to move the line.
    clock = threading.Thread(target=_count, args=(what, over), daemon=True)
    clock.start()
    try:
        yield
    finally:
        over.set()
        clock.join()


def _count(what: str, over: threading.Event) -> None:
    start = time.monotonic()
    if over.wait(_SILENT_SECONDS):
        return
    with tqdm(bar_format="{desc}", leave=False) as line:
        while True:
            line.set_description_str(f"sptc: {what}, {time.monotonic() - start:.0f} s")
            if over.wait(1.0):
                return
