"""The emitted kernels: `python -m bench.kernels --aot` (no GPU needed) and `--tune` (a GPU needed). `python -m bench.gpu` runs them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import astuple

from tabulate import tabulate

from bench.kernels import ahead, cases, tuning
from sptc.codegen.triton.target import KNOWN


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--aot", action="store_true", help="compile every template ahead of time and check what the result uses")
    what.add_argument("--tune", action="store_true", help="measure tile sizes on this GPU and keep the best for later runs")
    parser.add_argument("--target", choices=KNOWN, action="append", help="with --aot; default: all")
    parser.add_argument("--only", default="", help="cases whose name contains this; with --aot templates, too")
    arguments = parser.parse_args()
    if arguments.aot:
        sys.exit(compile_all(arguments.target or list(KNOWN), arguments.only))
    sys.exit(tuning.run(arguments.only))


def compile_all(targets: list[str], only: str) -> int:
    """Print the table of `--aot`; 1 if a bound is broken."""
    named = [name for name in sorted(ahead.templates()) if only.lower() in name]
    chosen = cases.ATTENTION if named else cases.named(cases.ATTENTION, only)
    rows = []
    for row in ahead.compiled(chosen, [KNOWN[name] for name in targets], named):
        rows.append(row)
        print(f"{len(rows)} {row.target} {row.template} {', '.join(row.broken)}", file=sys.stderr, flush=True)
    used = ["registers", "spilled bytes", "shared memory", "matrix instructions", "of warpgroups"]
    headers = ["template", "case", "target", *used, "broken bounds"]
    cells = [
        (r.template, r.case, r.target, *(astuple(r.used) if r.used else [None] * len(used)), "; ".join(r.broken))
        for r in sorted(rows, key=lambda r: (r.template, r.target, r.case))
    ]
    broken = sum(bool(r.broken) for r in rows)
    print(tabulate(cells, headers))
    print(f"{len(rows)} kernels, {broken} with a broken bound")
    return 1 if broken else 0


if __name__ == "__main__":
    main()
