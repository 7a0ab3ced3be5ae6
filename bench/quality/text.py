"""Text that every machine with torch has: the standard library's sources, split into two halves by package, and torch's C++ headers."""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Not text that people wrote (tables of encodings and topics, grammars), or not in every CPython: Debian splits off idlelib, tkinter and the
# tests, and distutils, lib2to3 and their like left the library after 3.11.
LEFT_OUT = frozenset(
    {
        *("test", "tests", "idlelib", "tkinter", "turtle", "turtledemo", "distutils", "lib2to3", "ensurepip"),
        *("encodings", "pydoc_data", "site-packages", "dist-packages"),
    }
)
HEADERS = ("c10", "torch/csrc/api", "torch/csrc/jit")  # below torch's include folder; the rest is mostly generated


@dataclass(frozen=True)
class Split:
    """Files to train on, and files that are only evaluated on."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]

    @classmethod
    def of(cls, files: Sequence[Path]) -> Split:
        """Of the files, largest first, every second one is held out."""
        ordered = sorted(files, key=lambda path: (-path.stat().st_size, str(path)))
        return cls(tuple(ordered[::2]), tuple(ordered[1::2]))


def library_halves(root: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The standard library's Python files in two halves that share no package; a module of its own is a package of one file.

    By size, the packages go to the halves in turns: the second half has what the first one leaves.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    packages: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not LEFT_OUT & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            packages.setdefault(parts[0], []).append(path)
    ordered = sorted(packages.items(), key=lambda item: (-sum(path.stat().st_size for path in item[1]), item[0]))
    first, second = ([path for _, files in ordered[start::2] for path in files] for start in (0, 1))
    return first, second


def headers(root: Path | None = None) -> list[Path]:
    """The C++ headers that torch installs."""
    root = root or Path(torch.__file__).parent / "include"
    found = [path for folder in HEADERS for path in sorted((root / folder).rglob("*.h"))]
    if not found:
        raise FileNotFoundError(f"no C++ headers under {root}: this torch was installed without them")
    return found


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def documented_functions(source: str) -> Iterator[tuple[str, str]]:
    """(code without its docstring, docstring) of each function in a Python source that has both; nothing for one that does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring, statement = ast.get_docstring(node), node.body[0]
        if not docstring or statement.lineno == node.lineno:
            continue
        head, tail = lines[node.lineno - 1 : statement.lineno - 1], lines[statement.end_lineno : node.end_lineno]
        yield textwrap.dedent("".join(head + tail)), docstring
