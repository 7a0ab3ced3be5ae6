"""Running emitted kernels in Triton's interpreter, on CPU tensors, in a process where Triton was imported to compile.

Triton decides at import whether its own functions of `tl` (zeros, sum, sigmoid, philox, ...) are compiled or interpreted. So during a
launch they stand in as plain Python, as Triton's interpreter does itself with the builtins of `tl`. Helpers of a kernel become plain
Python too: called as they are, each call would patch `tl` anew, and for good.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import triton.experimental.gluon  # noqa: F401  imported by Triton on first use, and fails while its functions are plain
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

_lock = threading.RLock()


@contextmanager
def interpreting() -> Iterator[None]:
    """Triton's own functions are plain Python inside. One thread at a time."""
    with _lock:
        members = _library()
        for holder, name, _, plain in members:
            setattr(holder, name, plain)
        try:
            yield
        finally:
            for holder, name, original, _ in members:
                setattr(holder, name, original)


def make_plain(module: ModuleType, kernel: str) -> None:
    """Prepare a module whose functions were decorated for the interpreter: all but `kernel` become plain Python."""
    # The interpreter patches those of `tl` and `tl.core` that the kernel's module names; Triton's own functions use the latter.
    module.__dict__["core"] = tl.core
    for name, member in list(vars(module).items()):
        if isinstance(member, InterpretedFunction) and name != kernel:
            setattr(module, name, _plain(member.fn))


@functools.cache
def _library() -> list[tuple[Any, str, Any, Any]]:
    """(module, name, as Triton has it, as it stands in) of what is replaced during a launch."""
    holders: tuple[Any, ...] = (tl, tl.core, tl.standard, tl.math, tl.random, tl.tensor)
    functions = [
        (holder, name, member, _plain(member.fn))
        for holder in holders
        for name, member in list(vars(holder).items())
        if isinstance(member, JITFunction | InterpretedFunction)
    ]
    return [*functions, (interpreter, "_patch_lang_tensor", interpreter._patch_lang_tensor, _patch_tensor)]


def _patch_tensor(tensor: Any, scope: Any, patch: Callable[..., None] = interpreter._patch_lang_tensor) -> None:
    """Triton's own patch of its tensors, whose `__index__` also reads an array of one element.

    The interpreter keeps scalars as such arrays. Triton 3.6 calls int() on them, which NumPy refuses from 2.4 on; 3.7 squeezes them first.
    """
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))


@functools.cache
def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    plain = InterpretedFunction(function).rewrite()
    plain.fn = plain  # reductions look for their combining function here
    return plain
