"""What libraries keep for a whole process, put back: scripts run one after another, each as in a process of its own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Nothing that ran before is seen inside, and nothing of what runs inside is seen after it.

    Compiled code; the precision, device and accumulation that accelerate chose first and then keeps; environment variables, by which
    frameworks hand on how they compile, seed and shard. A group of processes stays: all scripts of a rank share it.
    """
    before = dict(os.environ)
    _forget()
    try:
        yield
    finally:
        _forget()
        os.environ.clear()
        os.environ.update(before)


def _forget() -> None:
    torch._dynamo.reset()
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
