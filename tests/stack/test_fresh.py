"""One script's settings are not those of the next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.stack.matrix import Cell, Run, run_script


def in_bf16(run: Run) -> None:
    """Whatever precision a process asks accelerate for first, it keeps."""
    from accelerate import Accelerator

    Accelerator(cpu=True, mixed_precision="bf16")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def test_no_script_sees_the_state_of_another(tmp_path: Path) -> None:
    """A reference of two processes ran in bf16, as a cell before it had left accelerate, and gradients differed by some thousandths."""
    seen: list[Any] = []

    def ask(run: Run) -> None:
        from accelerate import Accelerator

        seen.append((Accelerator(cpu=True).mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION")))

    for script in (in_bf16, ask, in_bf16):
        run_script(Cell("a script", script), "eager", tmp_path)
    assert seen == [("no", None)]
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
