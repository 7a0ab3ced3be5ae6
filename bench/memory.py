"""What a training step adds to a model's memory, Inductor against "spt": `python -m bench.memory [--case NAME] [--variant NAME]`.

LoRA steps of random models on a CPU, each variant of each case in a process of its own, one after the other and on one thread. Memory is
the most that a step takes beyond what the process holds at rest, with the allocator trimmed before; it does not depend on what else the
machine does. Of it, "tensors" is what torch's allocator gave out at once: the rest are holes in the heap of the C library, which has few
where the environment says `MALLOC_MMAP_THRESHOLD_=1000000`. Times depend: processor time is given, the least of a few steps. Loss and
gradients of the exact variants stand beside the dense ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sptc.benchmark.child.process import Worker
from sptc.benchmark.child.worker import Check, Runner
from sptc.benchmark.job import Job, Source
from sptc.benchmark.variants import Variant

RANK, STEPS = 16, 3

VARIANTS = {
    "inductor": Variant("inductor", "inductor"),
    # Only the settings by which AOTAutograd's partitioner keeps little, as objective "memory" has them: without any rewrite.
    "inductor-lean": Variant("inductor-lean", "inductor", keeps_little=True),
    # Nothing left out; logits, which nothing uses, are deferred, as by default, or computed in every step.
    "exact": Variant("exact", "spt", {"max_rise": 0.0}),
    "kept": Variant("kept", "spt", {"max_rise": 0.0, "loss.logits": "keep"}),
    # The loss alone, which is exact.
    "loss": Variant("loss", "spt", {"attention.enabled": False, "ffn.enabled": False, "loss.logits": "drop"}),
    # Besides, backward computes hidden values of FFNs again: exact as well.
    "recompute": Variant("recompute", "spt", {"attention.enabled": False, "max_rise": 0.0, "ffn.recompute": True, "loss.logits": "drop"}),
    # Whatever is cheap to compute again besides, FFNs for all tokens at once: exact as well.
    "at-once": Variant("at-once", "spt", {"objective": "memory", "max_rise": 0.0, "ffn.chunk": 0, "loss.logits": "drop"}),
    # FFNs in chunks of tokens, too: exact as well.
    "memory": Variant("memory", "spt", {"objective": "memory", "max_rise": 0.0, "loss.logits": "drop"}),
    # The loss, attention at 1/8, and FFNs at 1/4 for tokens whose label does not count.
    "spt": Variant("spt", "spt", {"loss.logits": "drop", "attention.density": 0.125, "ffn.density": 1.0, "ffn.context_density": 0.25}),
    # The defaults, which measure densities on the first batch.
    "default": Variant("default", "spt"),
    # The paper's routed FFN, for what rests after `sptc.prepare`: its gradients are others.
    "routed": Variant("routed", "spt", {"ffn.selector": "router", "ffn.density": 0.5}, prepares=True),
}


@dataclass(frozen=True)
class Case:
    """A factory of a model, and its step."""

    factory: str
    batch: int
    length: int
    counted: float = 1.0  # share of the tokens with a label
    dtype: str = "fp32"
    checkpointing: bool = False


CASES = {
    "gpt2": Case("bench.shapes:gpt2", 4, 512),
    "gpt2, a quarter counts": Case("bench.shapes:gpt2", 4, 512, counted=0.25),
    "gpt2, checkpointing": Case("bench.shapes:gpt2", 4, 512, checkpointing=True),
    "qwen2, bf16": Case("bench.shapes:qwen2", 2, 1024, dtype="bf16"),
    "qwen2, fp32": Case("bench.shapes:qwen2", 2, 1024),
    "qwen2, bf16, checkpointing": Case("bench.shapes:qwen2", 2, 1024, dtype="bf16", checkpointing=True),
    "qwen2, fp32, checkpointing": Case("bench.shapes:qwen2", 2, 1024, checkpointing=True),
}


@dataclass
class Result:
    """Of one variant of one case."""

    case: str
    variant: str
    loss: float
    gradient_norm: float
    losses: str  # what became of the model's loss
    rest_mib: float
    added_mib: float
    tensors_mib: float
    cpu_seconds: float


def measure(case: str, variant: str, cache: str) -> Result:
    """Compile and run one variant of a case in a new process."""
    c = CASES[case]
    job = Job(
        Source(c.factory), VARIANTS[variant], c.batch, c.length, c.dtype, "cpu", RANK, c.counted, c.checkpointing, threads=1, cache=cache
    )
    with Worker(f"{case}, {variant}", Runner, job) as worker:
        check: Check = worker.one("check", None)
        cpu = min(seconds for _, seconds in worker.one("steps", STEPS))
        rests, added = zip(*(worker.one("memory") for _ in range(2)), strict=True)
        tensors: float = worker.one("tensors")
        rows: list[dict[str, Any]] = (worker.one("report") or {}).get("regions", [])
        told = ", ".join(f"{r['status']} [{r['rule']}]" if r["rule"] else r["status"] for r in rows if r["kind"] == "loss")
    return Result(case, variant, check.loss, check.norm, told, max(rests), max(added), tensors, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated (default: all)")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="beside inductor; may be repeated (default: all)")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    arguments = parser.parse_args()
    variants = ["inductor", *(v for v in arguments.variant or VARIANTS if v != "inductor")]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as cache:
        for case in arguments.case or CASES:
            for variant in variants:
                results.append(measure(case, variant, cache))
                print(f"{table(results)}\n", flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


def table(results: list[Result]) -> str:
    """A row for each result, beside that of Inductor for the same case."""
    rows = []
    for r in results:
        dense = next(d for d in results if d.case == r.case)
        figures = (
            f"{r.loss:.5f}",
            f"{r.gradient_norm:.4f}",
            f"{r.rest_mib:.0f}",
            f"{r.rest_mib / dense.rest_mib:.2f}",
            f"{r.added_mib:.0f}",
            f"{r.added_mib / dense.added_mib:.2f}",
            f"{r.tensors_mib:.0f}",
            f"{r.tensors_mib / dense.tensors_mib:.2f}",
        )
        rows.append((r.case, r.variant, r.losses, *figures, f"{dense.cpu_seconds / r.cpu_seconds:.2f}x"))
    memory = ("MiB at rest", "of Inductor's", "a step adds", "of Inductor's", "tensors", "of Inductor's")
    headers = ("case", "variant", "its loss", "value", "gradients", *memory, "faster")
    return tabulate(rows, headers, disable_numparse=True)


if __name__ == "__main__":
    main()
