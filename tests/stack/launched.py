"""A rank of a cell that a command starts: `accelerate launch ... -m tests.stack.launched KIND FOLDER` leaves its outcome in the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.stack.matrix import Cell, Kind, Outcome, run_script
from tests.stack.parallel import accelerated

WORLD = 2
CELL = Cell("accelerate launch, two processes", accelerated)
_ROOT = Path(__file__).parents[2]


def launch(kind: Kind, folder: Path) -> list[Outcome]:
    """Run the cell by accelerate's command and return what each rank found, that of rank 0 first."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(WORLD), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += ["-m", "tests.stack.launched", kind, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{kind}-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def main() -> None:
    kind, folder = sys.argv[1:]
    outcome = run_script(CELL, kind, Path(folder))  # type: ignore[arg-type]
    torch.save(outcome, Path(folder) / f"{kind}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
