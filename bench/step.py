"""Whole LoRA steps of random models on this machine, by `sptc.bench`: `python -m bench.step`, which is `make bench`.

One table, a row for each shape: the best dense variant, "spt" at density 1, and "spt" at given densities (those that would be measured
on random weights say nothing). `--all` compares more densities, `--shape qwen2` is one shape.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sptc.benchmark.bench import bench
from sptc.benchmark.job import DTYPES
from sptc.benchmark.outcome import Case, Outcome, ratio

SHAPES: dict[str, tuple[str, int, int]] = {  # a factory, sequences, tokens of each
    "qwen2": ("bench.shapes:qwen2", 2, 1024),
    "llama-long": ("bench.shapes:llama", 1, 4096),
    "opt": ("bench.shapes:opt", 8, 512),
    "opt-short": ("bench.shapes:opt", 16, 128),
    "qwen2-2k": ("bench.shapes:qwen2", 1, 2048),
    "qwen2-8k": ("bench.shapes:qwen2", 1, 8192),
    "opt-2048": ("bench.shapes:opt2048", 8, 512),
}
SMALL = ("qwen2", "llama-long", "opt", "opt-short")  # ten minutes on two cores

BOTH = "both"
_EIGHTH = {"attention.density": 0.125}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention 1/8": {**_EIGHTH, "ffn.enabled": False},
    "FFN 1/2": {"attention.enabled": False, "ffn.density": 0.5, "ffn.context_density": None},
    BOTH: {**_EIGHTH, "ffn.density": 0.5, "ffn.context_density": None},
    "both, context 1/4": {**_EIGHTH, "ffn.density": 1.0, "ffn.context_density": 0.25},
    "both, context 1/8": {**_EIGHTH, "ffn.density": 1.0, "ffn.context_density": 0.125},
}
HEADERS = ("shape", "tokens", "best dense", "ms", "density 1", "variant", "faster", "quartiles", "by processor", "step's MiB", "compile s")


def rows(shape: str, case: Case) -> list[tuple[str, ...]]:
    """A row for each sparse variant, beside the best dense one."""
    base, one = case.baseline, case.named("spt-density-1")
    if base is None:
        return [(shape, case.name, "failed", *[""] * (len(HEADERS) - 3))]
    kernels = "" if one is None else f"{ratio(base, one).median:.2f}x"
    dense = (shape, case.name, base.variant.name, f"{base.wall().median * 1e3:.0f}", kernels)
    return [(*dense, o.variant.name, *_figures(base, o)) for o in case.outcomes if not o.variant.exact]


def _figures(base: Outcome, o: Outcome) -> tuple[str, ...]:
    if not o.timed:
        return ("failed", "", "", "", "")
    wall = ratio(base, o)
    memory = "" if o.step_mib is None or not base.step_mib else f"{o.step_mib / base.step_mib:.2f}x"
    spread = f"{wall.low:.2f} to {wall.high:.2f}"
    return f"{wall.median:.2f}x", spread, f"{ratio(base, o, 1).median:.2f}x", memory, f"{o.compile_cold:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help=f"may be repeated (default: {', '.join(SMALL)})")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="as of sptc bench (default: %(default)s)")
    parser.add_argument("--counted", type=float, default=1.0, help="share of the tokens with a label (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help=f"compare {', '.join(VARIANTS)}, not only {BOTH}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=25.0, help="of timing for each shape (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    arguments = parser.parse_args()
    variants = VARIANTS if arguments.all else {BOTH: VARIANTS[BOTH]}
    table: list[tuple[str, ...]] = []
    measured: dict[str, Any] = {}
    for shape in arguments.shape or SMALL:
        factory, batch, length = SHAPES[shape]
        dense = [] if arguments.dtype == "bf16" else ["inductor-best"]
        done = bench(
            factory,
            variants=variants,
            only=["inductor", *dense, "spt-density-1", *variants],
            dtype=arguments.dtype,
            sequences=batch,
            lengths=[length],
            lora=16,
            counted=arguments.counted,
            threads=arguments.threads,
            seconds=arguments.seconds,
            once=True,
        )
        print(f"{done}\n", flush=True)
        table += rows(shape, done.cases[0])
        measured[shape] = done.to_dict()
    print(tabulate(table, HEADERS, disable_numparse=True))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
