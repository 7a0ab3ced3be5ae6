"""DDP, FSDP2 and accelerate on two processes: gradients are the single process's, and no rank decides differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.stack.launched import CELL, launch
from tests.stack.matrix import MEASURED, PAPER, Cell, Facts, Kind, Outcome, check_exact, check_sparse, rows, run_script
from tests.stack.parallel import (
    accelerated,
    accumulated,
    compiled_between,
    compiled_inside,
    compiled_outside,
    prepared,
    sharded,
    sharded_accumulated,
    split,
)
from tests.stack.ranks import Ranks
from tests.stack.results import record


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Ranks]]:
    """Two processes that wait for work; new ones after a failure."""
    current: list[Ranks] = []

    def get() -> Ranks:
        if not current or not current[-1].alive:
            current.append(Ranks(tmp_path_factory.mktemp("ranks")))
        return current[-1]

    yield get
    for started in current:
        started.stop()


CELLS = (
    Cell("DDP around model.compile", compiled_inside),
    Cell("torch.compile around DDP", compiled_outside),
    Cell("torch.compile around DDP, several buckets", split, 12, {"attention": 2}, {"break": "DDPOptimizer"}),
    Cell("DDP around torch.compile", compiled_between),
    Cell("DDP, activation checkpointing", partial(compiled_inside, checkpoints=True)),
    Cell("DDP, static_graph", partial(compiled_inside, static_graph=True)),
    Cell("DDP, gradient accumulation under no_sync", accumulated),
    Cell("DDP, by Inductor", compiled_inside, inductor=True),
    Cell("DDP, measured densities", compiled_inside, options=MEASURED),
    Cell("FSDP2, each layer compiled", partial(sharded, where="layer"), 2),
    Cell("FSDP2, the model compiled", partial(sharded, where="model"), 8),
    Cell("FSDP2, activation checkpointing", partial(sharded, where="layer", checkpoints=True), 2),
    Cell("FSDP2, gradient accumulation", sharded_accumulated, 2),
    Cell("accelerate: Accelerator().prepare", accelerated),
    Cell("DDP, the paper's option", partial(prepared, shard=False), options=PAPER, tolerance=None),
    Cell("FSDP2, the paper's option", partial(prepared, shard=True), 2, options=PAPER, tolerance=None),
)


@pytest.mark.parametrize("cell", rows("Two processes", CELLS))
def test_two_processes(cell: Cell, ranks: Callable[[], Ranks], tmp_path: Path, record_property: Any) -> None:
    record(record_property, check_ranks(cell, lambda kind: ranks().run(run_script, cell, kind, tmp_path), tmp_path))


@pytest.mark.parametrize("cell", rows("Two processes", [CELL]))
def test_launched(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    """accelerate's own command starts the processes; it finds the backend in each."""
    record(record_property, check_ranks(cell, lambda kind: launch(kind, tmp_path), tmp_path))


def check_ranks(cell: Cell, ranks: Callable[[Kind], list[Outcome]], folder: Path) -> Facts:
    """Gradients at density 1 are those of one process, and both ranks decide and compute the same."""
    error = None
    if cell.tolerance is not None:
        eager = run_script(cell, "eager", folder)
        error = max(check_exact(cell, exact, eager) for exact in ranks("exact"))
    first, second = ranks("sparse")
    facts = check_sparse(cell, first, error)
    assert check_sparse(cell, second, error) == facts
    decided = [[(r.kind, r.module, r.status, r.settings) for r in outcome.report.regions] for outcome in (first, second)]
    assert decided[0] == decided[1]
    for name, gradient in first.gradients.items():
        assert gradient.equal(second.gradients[name]), f"{name} differs between ranks"
    return facts
