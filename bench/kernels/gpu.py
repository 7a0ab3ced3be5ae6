"""`make gpu`: every kernel against the reference, then times beside the best dense alternatives, as one JSON and a few tables."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.kernels import attention, check, ffn
from bench.kernels.cases import AttentionCase, FfnCase, named
from bench.kernels.warm import warm
from sptc.codegen.target import target_of

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Plan:
    """What a run does. Cases come in order of importance: those that no time is left for are named as not run."""

    device: torch.device
    dtype: torch.dtype
    checks: Sequence[AttentionCase | FfnCase]
    attention: Sequence[AttentionCase]
    ffn: Sequence[FfnCase]
    products: Sequence[FfnCase]
    rounds: int
    minutes: float


@dataclass
class Results:
    """What a run found, as the JSON holds it. Rows are flat mappings of a case's name and its figures."""

    machine: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    ffn: list[dict[str, Any]] = field(default_factory=list)
    products: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures and not self.not_run and all(row["passed"] for row in self.checks)


def run(path: Path | None, only: str, minutes: float) -> int:
    """Run on the present GPU; 0 if everything ran and is right."""
    if not torch.cuda.is_available():
        print("`--gpu` checks and times kernels on a GPU, and torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    timed = [case for case in (*attention.CASES, *ffn.CASES) if case in named((case,), only)]
    plan = Plan(
        device,
        torch.bfloat16,
        named(check.CASES, only),
        [case for case in timed if isinstance(case, AttentionCase)],
        [case for case in timed if isinstance(case, FfnCase)],
        [case for case in timed if isinstance(case, FfnCase)],
        rounds=9,
        minutes=minutes,
    )
    start = time.monotonic()
    errors = warm((*plan.checks, *plan.ffn, *plan.attention), target_of(device), plan.dtype, os.cpu_count() or 1)
    print(f"compiled in {time.monotonic() - start:.0f} s; {len(errors)} cases failed to", file=sys.stderr)
    plan = replace(plan, minutes=minutes - (time.monotonic() - start) / 60)
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
    results = execute(plan, path or RESULTS / f"gpu_{name}.json")
    print_tables(results)
    return 0 if results.passed else 1


def execute(plan: Plan, path: Path) -> Results:
    """Do all of the plan. The file is written after each case: a run that is stopped leaves what it found."""
    results, start = Results(machine(plan.device)), time.monotonic()

    def each(cases: Sequence[Any], rows: list[dict[str, Any]], function: Callable[[Any], list[dict[str, Any]]], what: str) -> None:
        for case in cases:
            if time.monotonic() - start > 60 * plan.minutes:
                results.not_run.append(f"{what}: {case.name}")
                continue
            print(f"{time.monotonic() - start:6.1f} s  {what}: {case.name}", file=sys.stderr, flush=True)
            try:
                rows += function(case)
            except Exception as error:  # reported with its case, and the run fails
                text = traceback.format_exc()
                print(text, file=sys.stderr, flush=True)
                results.failures.append({"case": f"{what}: {case.name}", "error": f"{type(error).__name__}: {error}"[:500], "trace": text})
            finally:
                if plan.device.type == "cuda":
                    torch._dynamo.reset()  # a case compiles its own code, and its limit of recompiles is its own
                    torch.cuda.empty_cache()
            results.seconds = time.monotonic() - start
            _write(results, path)

    device, dtype, rounds = plan.device, plan.dtype, plan.rounds
    each(plan.checks, results.checks, lambda case: [_check_row(c) for c in check.check(case, device, dtype)], "check")
    each(plan.products, results.products, lambda case: ffn.measure_products(case, device, dtype, rounds), "grouped products")
    each(plan.ffn, results.ffn, lambda case: ffn.rows(case, ffn.measure(case, device, dtype, rounds)), "FFN")
    each(plan.attention, results.attention, lambda case: attention.rows(case, attention.measure(case, device, dtype, rounds)), "attention")
    return results


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on."""
    import triton

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_tables(results: Results) -> None:
    """Everything for people."""
    print(f"\n{', '.join(f'{key} {value}' for key, value in results.machine.items() if value)}, {results.seconds:.0f} s\n")
    wrong = [row for row in results.checks if not row["passed"]]
    cases = len({row["case"] for row in results.checks})
    print(f"{len(results.checks)} tensors of {cases} cases against the fp64 reference: {len(wrong)} wrong")
    for title, rows in (
        ("", wrong),
        ("Attention, selection included (attend: without it)", results.attention),
        ("FFN, router included", results.ffn),
        ("Grouped products", results.products),
    ):
        if rows:
            print(f"\n{title}\n" + tabulate([_rounded(row) for row in rows], headers="keys"))
    for failure in results.failures:
        print(f"\nFAILED {failure['case']}: {failure['error']}")
    for case in results.not_run:
        print(f"\nNOT RUN, out of time: {case}")


def _check_row(result: check.Check) -> dict[str, Any]:
    return {**asdict(result), "passed": result.passed}


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in row.items()}


def _write(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(asdict(results), indent=1) + "\n")
    os.replace(partial, path)


def _commit() -> str:
    """The commit of the working tree, "+" after it if files differ; "unknown" outside a repository."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
