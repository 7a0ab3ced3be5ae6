"""A cell of the matrix: one way to train, as a script that a user would write, and what must hold of it.

A script runs three times on the same weights and data: eager and compiled at density 1, both up to the first step of the optimizer, and
compiled sparse, to its end. Gradients are recorded where every stack ends up, at that step: a script says nothing of what is checked.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sptc
from tests.models.compiled import FULL, assert_gradients_close, without_inductor
from tests.stack.fresh import fresh
from tests.stack.models import REGIONS

SPARSE = {
    "decline": "never",
    "attention.density": 0.5,
    "attention.query_block": 4,
    "attention.key_block": 4,
    "ffn.density": 0.75,
    "ffn.context_density": 0.5,
}

MEASURED = {"decline": "never", "max_rise": 1.0}  # the default densities, of random weights that would bear little

PAPER = {
    **{key: SPARSE[key] for key in SPARSE if "density" not in key},
    "ffn.selector": "router",
    "attention.selector": "pq",
    "ffn.blocks": 4,
}

Kind = Literal["eager", "exact", "sparse"]


class Run:
    """One run of a script: how it compiles, and what is recorded of it."""

    def __init__(self, kind: Kind, folder: Path, options: Mapping[str, Any], inductor: bool = False) -> None:
        self.kind = kind
        self.folder = folder
        self.options = dict(FULL if kind == "exact" else options)
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}  # of the first optimizer step, by parameter name
        self.compiles = 0
        self.compiled: Any = None  # what sptc.report is asked of
        self.report: sptc.Report | None = None  # if the script took it, because it goes on to change the model
        self._inner: Any = None if inductor else without_inductor(**self.options)
        self.trained: dict[str, nn.Parameter] = {}
        self._before: dict[str, Tensor] = {}

    @property
    def sparse(self) -> bool:
        return self.kind == "sparse"

    def train(self, model: Any) -> Any:
        """Say which model is trained, once it has its trainable parameters; the model itself is returned."""
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._before = {name: whole(p).detach().clone() for name, p in self.trained.items()}
        return model

    def backend(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """The Dynamo backend: it counts what it compiles."""
        self.compiles += 1
        if self._inner is None:
            return torch._dynamo.lookup_backend("spt")(gm, example_inputs, options=self.options)  # type: ignore[call-arg]
        return self._inner(gm, example_inputs)

    def compile_in_place(self, model: nn.Module, **more: Any) -> None:
        """`model.compile(backend="spt")`."""
        if self.kind != "eager":
            model.compile(backend=self.backend, **more)
            self.compiled = model

    def compile(self, function: Any, **more: Any) -> Any:
        """`torch.compile(function, backend="spt")`."""
        if self.kind == "eager":
            return function
        self.compiled = torch.compile(function, backend=self.backend, **more)
        return self.compiled

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the gradients of the first optimizer step; the runs that are compared end there."""

        def record(*_: Any) -> None:
            if not self.gradients:
                self.gradients = {name: whole(p.grad).detach().clone() for name, p in self.trained.items() if p.grad is not None}
            if not self.sparse:
                raise _Enough

        handle = register_optimizer_step_pre_hook(record)
        try:
            with contextlib.suppress(_Enough):
                yield
        finally:
            handle.remove()

    def still(self) -> list[str]:
        """Names of the trained tensors that training did not move."""
        return [name for name, p in self.trained.items() if torch.equal(whole(p), self._before[name])]


class _Enough(BaseException):
    """Ends a script at its first optimizer step."""


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        name: what is combined with sptc.
        script: trains `run.train(model)`, compiles by `run`, appends to `run.losses`.
        compiles: the most graphs that the sparse run may compile.
        regions: how many regions of each kind the graphs that train must have rewritten.
        says: parts of what the report must say of what stays dense: by a kind of region, "break" or "note".
        options: of the sparse run.
        tolerance: of the gradients of the first step at density 1 against eager mode; None where they can't be compared.
        why: where `tolerance` is None, what makes two runs differ; otherwise a remark for the table.
        falls: whether the loss must fall.
        inductor: compile by Inductor.
        fast: a matter of seconds, and in `make test` too.
        needs: a package beyond those of the dev extra.
    """

    name: str
    script: Callable[[Run], None]
    compiles: int = 1
    regions: Mapping[str, int] = field(default_factory=lambda: REGIONS)
    says: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=lambda: SPARSE)
    tolerance: float | None = 1e-5
    why: str = ""
    falls: bool = True
    inductor: bool = False
    fast: bool = False
    needs: str | None = None


@dataclass(frozen=True)
class Facts:
    """What the table says of a cell."""

    rewritten: str
    compiles: int
    error: float | None
    says: tuple[str, ...]


def rows(group: str, cells: Iterable[Cell]) -> list[Any]:
    """Cells as parameters of a test, with the marks by which they are chosen and by which the table finds them."""
    out = []
    for cell in cells:
        marks = [pytest.mark.cell(group, cell.name)]
        marks += [] if cell.fast else [pytest.mark.stack]
        marks += [pytest.mark.needs(cell.needs)] if cell.needs else []
        out.append(pytest.param(cell, id=cell.name.replace(" ", "-"), marks=marks))
    return out


@dataclass(frozen=True)
class Outcome:
    """What a run left, as plain data: it may come from another process."""

    gradients: dict[str, Tensor]
    losses: list[float]
    compiles: int
    still: list[str]
    report: sptc.Report | None


def run_script(cell: Cell, kind: Kind, folder: Path) -> Outcome:
    with fresh():
        run = Run(kind, folder / kind, cell.options, cell.inductor)
        run.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(3)
        with run.recording():
            cell.script(run)
        report = (run.report or sptc.report(run.compiled)) if run.sparse else None
    return Outcome(run.gradients, run.losses, run.compiles, run.still(), report)


def check(cell: Cell, folder: Path) -> Facts:
    """Run the cell and assert all that it promises."""
    error = None
    if cell.tolerance is not None:
        error = check_exact(cell, run_script(cell, "exact", folder), run_script(cell, "eager", folder))
    return check_sparse(cell, run_script(cell, "sparse", folder), error)


def check_exact(cell: Cell, exact: Outcome, eager: Outcome) -> float:
    """Gradients at density 1 against those of the reference; the largest error is returned."""
    assert cell.tolerance is not None and eager.gradients, "the script took no optimizer step"
    assert exact.compiles, "the script compiled nothing"
    assert_gradients_close(exact.gradients, eager.gradients, cell.tolerance)
    return gradient_error(exact.gradients, eager.gradients)


def check_sparse(cell: Cell, run: Outcome, error: float | None) -> Facts:
    assert run.losses and all(map(math.isfinite, run.losses)), run.losses
    report = run.report
    assert report is not None
    rewritten, dense = regions_of(report)
    assert rewritten == cell.regions, f"\n{report}"
    says = [said(report, kind, part) for kind, part in cell.says.items()]
    assert "recompile_limit" in cell.says.get("note", "") or not any("recompile_limit" in note for note in report.notes), report.notes
    assert run.compiles <= cell.compiles, f"{run.compiles} graphs were compiled, {cell.compiles} at most were to be\n{report}"
    assert not run.still, f"training moved nothing of {run.still}"
    if cell.falls:
        third = max(1, len(run.losses) // 3)
        assert sum(run.losses[-third:]) < sum(run.losses[:third]), f"the loss did not fall: {run.losses}"
    counts = ", ".join(f"{rewritten[kind]} {kind}" for kind in REGIONS if rewritten[kind] or dense[kind])
    return Facts(counts, run.compiles, error, (*says, *([cell.why] if cell.why else [])))


def said(report: sptc.Report, kind: str, part: str) -> str:
    """The first sentence of the report with `part` in it, about regions of a kind, graph breaks or as a note."""
    sentences = {"break": report.breaks, "note": report.notes}.get(kind)
    if sentences is None:
        sentences = [f"{kind}: {r.reason}" for r in report.regions if r.kind == kind and r.status != "rewritten"]
    found = [sentence for sentence in sentences if part in sentence]
    assert found, f"the report does not say {part!r} of {kind}\n{report}"
    return found[0]


def regions_of(report: sptc.Report) -> tuple[Counter[str], Counter[str]]:
    """How many regions of each kind are rewritten in at least one of their graphs, and how many in none; losses apart."""
    rewritten: Counter[str] = Counter()
    dense: Counter[str] = Counter()
    for same in report._by_region():  # the rows of one region in all graphs of its code
        if same[0].kind not in ("loss", "graph"):
            (rewritten if any(r.status == "rewritten" for r in same) else dense)[same[0].kind] += 1
    return rewritten, dense


def gradient_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest error of a gradient, by the measure of `assert_gradients_close`."""
    largest = max(float(g.abs().max()) for g in want.values())
    return max(
        float((got[name].double() - g.double()).abs().max()) / max(float(g.abs().max()), 1e-2 * largest)
        for name, g in want.items()
        if name in got
    )
