"""What one process runs: a model, a batch, a dtype, a variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sptc.benchmark.variants import BenchError, Variant
from sptc.model.load import load_trained

# What a benchmark may compute in, and the weights for it. "bf16" is autocast; beside "bf16-weights" PEFT's adapters are fp32.
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "bf16-weights": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """Where a process gets its model from: a name, as `sptc.model.load` takes it, or a file that holds (model, inputs)."""

    name: str | None
    file: str | None = None

    def load(self, batch: int, length: int) -> tuple[Callable[..., Any], Any, list[str]]:
        """(model, inputs, notes); the same in every process."""
        torch.manual_seed(0)
        if self.file is not None:
            return *torch.load(self.file, weights_only=False, mmap=True), []
        assert self.name is not None
        return load_trained(self.name, batch, length)

    @classmethod
    def saved(cls, model: Callable[..., Any], inputs: Any, folder: Path) -> Source:
        """A model of this process, written down for others.

        Raises:
            BenchError: it can't be pickled.
        """
        path = folder / "model.pt"
        try:
            torch.save((model, inputs), path)
        except Exception as error:  # pickle raises whatever the object at hand makes it raise
            raise BenchError(
                f"the model or its batch can't be handed to another process ({type(error).__name__}: {error}); "
                "give the name of a function that makes them, 'package.module:factory'"
            ) from error
        return cls(None, str(path))


@dataclass(frozen=True)
class Job:
    """The step of one variant."""

    source: Source
    variant: Variant
    batch: int
    length: int
    dtype: str | None  # one of DTYPES, or None: as the model is
    device: str
    lora: int  # rank of new adapters on every linear layer, 0 for none
    counted: float  # share of the tokens whose label counts
    checkpointing: bool
    threads: int | None
    cache: str  # a folder for compiled code
