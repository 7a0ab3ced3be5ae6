"""Text that every machine has: pieces of the Python standard library's sources, labelled with the package they are from."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

# In every CPython from 3.11 on (Debian splits off idlelib, tkinter and the tests), and with ten files or more: what is told of a package
# should be told from files of it that were not trained on.
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")


@dataclass(frozen=True)
class Pieces:
    """`input_ids` int64 [N, length], full length, no padding; `labels` int64 [N], an index into the packages."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]


def source_files(package: str) -> list[Path]:
    """The package's Python files, largest first.

    Raises:
        FileNotFoundError: the standard library of this interpreter lacks the package.
    """
    root = Path(sysconfig.get_path("stdlib")) / package
    files = [path for path in root.rglob("*.py") if not {"test", "tests"} & set(path.relative_to(root).parts)]
    if not files:
        raise FileNotFoundError(f"no sources of {package!r} under {root}; install the full Python standard library")
    return sorted(files, key=lambda path: (-path.stat().st_size, str(path)))


def cut(tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> list[list[int]]:
    """Consecutive pieces of `length` tokens, special tokens included; what is left of the file at the end is not used."""
    text = path.read_text(encoding="utf-8", errors="replace")
    encoded = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True, verbose=False)
    return [piece for piece in encoded["input_ids"] if len(piece) == length]


def read_pieces(
    tokenizer: PreTrainedTokenizerBase, length: int, most_held_out: int, packages: Sequence[str] = PACKAGES
) -> tuple[Pieces, Pieces]:
    """Training and held-out pieces, from different files: of each package's files by size, every second one is held out.

    Of the held-out pieces `most_held_out` are taken, evenly spaced.
    """
    train: list[tuple[list[int], int]] = []
    held_out: list[tuple[list[int], int]] = []
    for label, package in enumerate(packages):
        for rank, path in enumerate(source_files(package)):
            part = held_out if rank % 2 else train
            part.extend((piece, label) for piece in cut(tokenizer, path, length))
    step = max(1.0, len(held_out) / most_held_out)
    return _stack(train), _stack([held_out[int(i * step)] for i in range(min(most_held_out, len(held_out)))])


def _stack(rows: list[tuple[list[int], int]]) -> Pieces:
    ids, labels = zip(*rows, strict=True)
    return Pieces(torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))
