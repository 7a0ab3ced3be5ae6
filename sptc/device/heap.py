"""Memory of this process that is free and not given back."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Give the pages of freed memory back to the system, where the C library can.

    glibc takes arrays of up to 32 MiB from a heap, and gives back by itself no more than its end: what is freed below anything that lives
    stays with the process, and the next arrays are put where they fit, which may be elsewhere.
    """
    if sys.platform != "linux":  # Windows has no library without a name
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
