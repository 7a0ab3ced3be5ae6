"""The base class of errors for the user."""

from __future__ import annotations


class SptcError(Exception):
    """What this package raises for people: what is wrong, where in their model or options, and what to do.

    Each derives from the builtin that fits, too (a `ConfigError` is a `ValueError`). Sparse operators that are called directly raise the
    builtins for operands that do not fit, as torch's own do. A bug of this package is none of these.
    """
