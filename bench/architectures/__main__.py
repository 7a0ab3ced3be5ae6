"""What is found and refused in the architectures of transformers, and whether they equal eager at density 1.

    python -m bench.architectures run                        looks at all models of models.txt without a result, for half an hour
    python -m bench.architectures run MptForCausalLM:eager   looks at one again
    python -m bench.architectures table                      writes docs/architectures.md from the results

Exit code 1 if a model differs from eager or holds something that nobody mentions. `--find-only` looks without compiling: seconds a model.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.architectures.build import Unbuildable
from bench.architectures.look import Look, density_one, look, quiet
from bench.architectures.table import bad, table

HERE = Path(__file__).parent
MODELS = HERE / "models.txt"
RESULTS = HERE.parent / "results" / "architectures.jsonl"
TABLE = HERE.parent.parent / "docs" / "architectures.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.architectures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("models", nargs="*", help="CLASS or CLASS:sdpa or CLASS:eager; without any: all of models.txt without a result")
    parser.add_argument("--find-only", action="store_true", help="look, but do not compile")
    parser.add_argument("--seconds", type=int, default=300, help="limit for one model")
    arguments = parser.parse_args()
    looks = _read()
    if arguments.what == "table":
        TABLE.write_text(table(looks.values()))
    else:
        torch.set_num_threads(1)
        for name, attention in _chosen(arguments.models, looks):
            with quiet():
                seen = _one(name, attention, arguments.find_only, arguments.seconds)
            if isinstance(seen, Look):
                looks[name, attention] = seen
                _write(looks)
                print(name, attention, seen.found, seen.refused, "unmentioned:", seen.unmentioned, seen.density_one, flush=True)
            else:
                print(name, attention, "passed over:", seen, flush=True)
    return 1 if any(map(bad, looks.values())) else 0


def _chosen(given: list[str], looks: dict[tuple[str, str], Look]) -> Iterator[tuple[str, str]]:
    names = given or [line for line in MODELS.read_text().split() if line]
    for entry in names:
        name, _, attention = entry.partition(":")
        for kind in [attention] if attention else ["sdpa", "eager"]:
            if given or (name, kind) not in looks:
                yield name, kind


def _one(name: str, attention: str, find_only: bool, seconds: int) -> Look | str:
    """What was seen of a model, or why nothing was. What goes wrong in density 1 is part of what was seen."""
    torch._dynamo.reset()
    try:
        with _limit(seconds):
            seen = look(name, attention)
    except (Unbuildable, ValueError, TypeError, RuntimeError, ImportError, AttributeError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
    if find_only:
        return seen
    try:
        with _limit(seconds):
            return replace(seen, density_one=density_one(name, attention))
    except Exception as error:
        return replace(seen, density_one=f"BAD ({type(error).__name__}: {str(error).strip().splitlines()[0][:100]})")


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise RuntimeError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _read() -> dict[tuple[str, str], Look]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    every = [Look(**json.loads(line)) for line in lines]
    return {(one.name, one.attention): one for one in every}


def _write(looks: dict[tuple[str, str], Look]) -> None:
    RESULTS.write_text("".join(json.dumps(asdict(one)) + "\n" for _, one in sorted(looks.items())))


if __name__ == "__main__":
    sys.exit(main())
