"""The process that runs the cases of one stage: each guarded, each with a limit that is checked inside of it.

It is started before it is needed, so that its imports cost the run nothing, and told on stdin what to do. Where even the check inside of a
case does not come (a kernel that hangs, a compiler that loops), a timer in a thread of its own ends the process, and the parent starts
another one for the cases that are left. The same happens after a fault that takes the CUDA context with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.journal import Figures, Journal
from bench.gpu.stage import CONTEXT_DIED, Case, Limit, OutOfTime, Stage

GRACE = 8.0  # seconds beyond its limit after which a case is ended from outside
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class Job:
    """One stage, as the parent asks for it. `end` is that of the run, by `time.monotonic`; the file `trail` names the case in work."""

    stage: str
    path: str
    run: str
    start: float
    end: float
    trail: str
    dry: bool


def main(stages: str) -> None:
    """Import the stages, wait for a job, do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)  # a run that is killed leaves nothing running
    module = importlib.import_module(stages)
    text = sys.stdin.readline()
    if not text:
        return
    job = Job(**json.loads(text))
    journal = Journal(Path(job.path), job.run, job.start)
    stage = next(stage for stage in module.stages(job.dry, journal) if stage.name == job.stage)
    if job.dry and stage.interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # not before Triton is imported: its own functions are compiled, too
    run(stage, journal, job.end, Path(job.trail))
    sys.stdout.flush()
    os._exit(0)  # without waiting for compilers that were left behind


def run(stage: Stage, journal: Journal, end: float, trail: Path) -> None:
    """Do the cases that have not ended yet. The stage's seconds count from its first row, so that another process has what is left."""
    done, rows = journal.ended(stage.name), journal.rows(stage.name)
    began = journal.start + rows[0]["at"] if rows else time.monotonic()
    end = min(end, began + stage.seconds)
    for case in stage.cases:
        if case.name in done:
            continue
        limit = Limit(min(case.seconds, end - time.monotonic()))
        if limit.over():
            journal.write(stage.name, case.name, {"status": "not run", "error": "no time was left"})
            continue
        with trail.open("w") as file:
            file.write(case.name + "\n")
            file.flush()
            faulthandler.enable(file)
            faulthandler.dump_traceback_later(limit.left + GRACE, exit=True, file=file)
            journal.write(stage.name, case.name, _guarded(case, limit, journal, stage.name))
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
        trail.unlink()
        if _is_dead():
            os._exit(CONTEXT_DIED)  # clean-up would touch the device
        _forget()


def _guarded(case: Case, limit: Limit, journal: Journal, stage: str) -> Figures:
    """Run a case, rows as they come; how it ended."""
    began, status, error, trace = time.monotonic(), "ok", None, None
    try:
        rows: Iterable[Figures] = case.rows(limit)
        for row in rows:
            journal.write(stage, case.name, row)
            limit.check()
    except OutOfTime:
        status, error = "stopped", f"at its limit of {limit.seconds:.0f} s"
    except Exception as problem:  # reported with its case, and the run fails
        status, error = "failed", f"{type(problem).__name__}: {problem}"[:600]
        trace = "".join(traceback.format_exception(problem)[-6:])[-1500:]
    return {"status": status, "seconds": round(time.monotonic() - began, 2), "error": error, "trace": trace}


def _is_dead() -> bool:
    """Whether the CUDA context is lost: after an illegal access every later call fails."""
    torch: Any = sys.modules.get("torch")  # not imported here, but by the stages
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _forget() -> None:
    """A case compiles its own code, has its own limit of recompiles, and all of the memory."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
