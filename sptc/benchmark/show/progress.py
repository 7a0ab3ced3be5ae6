"""Progress on stderr: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress:
    """Shows nothing if `shown` is False."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._bar: tqdm | None = None

    def begin(self, total: int) -> None:
        """`total`: how often `advance` will be called."""
        self._bar = tqdm(total=total, disable=None if self._shown else True, bar_format="{percentage:3.0f}% {bar} {elapsed} {desc}")

    def say(self, text: str, often: bool = False) -> None:
        """What begins now; what is said often stays out of a log."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description_str(text)
        elif self._shown and not often:
            print(text, file=sys.stderr, flush=True)

    def advance(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
