"""C++ sources to loaded libraries, by the compiler that Inductor uses on a CPU too, kept in the private cache folder.

The functions are called by ctypes, which lets go of the GIL: they need no header of Python's or torch's, so each compiles in a second.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch._inductor.cpp_builder import get_cpp_compiler

from sptc.device.cache import private_folder
from sptc.device.costs import processor
from sptc.ir.errors import SptcError

REAL = {
    torch.float32: {"REAL": "float", "REAL_IS_FLOAT": "1", "STORED_IS_BF16": "0"},
    torch.float64: {"REAL": "double", "REAL_IS_FLOAT": "0", "STORED_IS_BF16": "0"},
    torch.bfloat16: {"REAL": "float", "REAL_IS_FLOAT": "1", "STORED_IS_BF16": "1"},
}
"""Macros of the sources for the dtype of what they read and write. bf16 is multiplied as it is where the processor can, else in fp32."""

_FOLDER = Path(__file__).parent / "native"
# Pairs of bf16 are moved as if each were one float.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing")


class CompilerError(SptcError, RuntimeError):
    """A CPU kernel does not compile here."""


def native(name: str, **macros: str) -> ctypes.CDLL:
    """The library of `native/<name>.cpp` with these macros defined.

    Raises:
        CompilerError: there is no C++ compiler, or it fails; with what it says.
    """
    return _native(name, tuple(sorted(macros.items())))


@functools.cache
def _native(name: str, macros: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    return library((_FOLDER / f"{name}.cpp").read_text(), dict(macros))


def library(source: str, macros: Mapping[str, str]) -> ctypes.CDLL:
    """`source` compiled for this processor and loaded; it may include the headers of `native/`."""
    compiler = _compiler()
    flags = [*_FLAGS, _processor_flag(), *(f"-D{key}={value}" for key, value in macros.items())]
    headers = [path.read_text() for path in sorted(_FOLDER.glob("*.h"))]
    key = hashlib.sha256("\n".join([compiler, _version(compiler), processor(), *flags, *headers, source]).encode()).hexdigest()[:32]
    path = private_folder("native") / f"{key}.so"
    if not path.exists():
        _compile(compiler, flags, source, path)
    return ctypes.CDLL(str(path))


@functools.cache
def _compiler() -> str:
    try:
        return get_cpp_compiler()
    except Exception as error:  # Inductor raises its own class, which has moved between releases
        raise CompilerError(
            f"sptc's CPU kernels need a C++ compiler, as Inductor does: install g++ or clang++, or set CXX ({error})"
        ) from error


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _processor_flag() -> str:
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"


def _compile(compiler: str, flags: list[str], source: str, path: Path) -> None:
    """Whole or not at all: the library appears under its name when it is ready, however many processes make it at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so.tmp")
    os.close(handle)
    try:
        command = [compiler, *flags, "-I", str(_FOLDER), "-x", "c++", "-o", temporary, "-"]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        if done.returncode:
            raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr}")
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
