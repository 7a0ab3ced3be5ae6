"""What was freed is given back."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from sptc.device.heap import give_back

PIECES, NUMBERS = 2000, 25_000  # of 100 kB, which the C library takes from its heap


def held() -> float:
    """MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library that can't")
def test_freed_memory_beneath_what_lives_is_given_back() -> None:
    pieces = [torch.zeros(NUMBERS) for _ in range(PIECES)]
    living = pieces[::10]
    del pieces
    before = held()
    give_back()
    assert held() < before - 100 and len(living) == PIECES // 10
