"""Whole LoRA steps of a Qwen2-shaped model on a CPU, Inductor against "spt": `python -m bench.step [--dtype bf16] [--counted 0.25]`.

4 layers, d 768, FFN 3072 gated, 12 heads, 2 x 1024 tokens, LoRA 16 on every projection; forward, loss and backward, without the optimizer.
Variants are compiled first and then timed in turns, in one process and on one thread: the ratio is of the least processor times, which
others on the machine disturb least. Densities are given, not measured: the weights are random, and what they bear says nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

VOCABULARY, LAYERS, SIZE, HIDDEN, HEADS, RANK = 8192, 4, 768, 3072, 12, 16

VARIANTS: dict[str, dict[str, Any] | None] = {
    "inductor": None,
    "density 1": {"decline": "never", "attention.density": 1.0, "ffn.density": 1.0, "ffn.context_density": None},
    "attention 1/8": {"ffn.enabled": False},
    "FFN 1/2": {"attention.enabled": False, "ffn.density": 0.5, "ffn.context_density": None},
    "both": {"ffn.density": 0.5, "ffn.context_density": None},
    "both, context 1/4": {"ffn.density": 1.0, "ffn.context_density": 0.25},
    "both, context 1/8": {"ffn.density": 1.0, "ffn.context_density": 0.125},
}


@dataclass
class Result:
    """Seconds of single steps, and MiB that a step adds to what rests."""

    variant: str
    compile_seconds: float
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    added_mib: float = 0.0
    rewritten: int = 0


def make_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model  # these two take seconds to import
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=SIZE,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        use_cache=False,
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(Qwen2ForCausalLM(config), lora).train()


def make_batch(batch: int, length: int, counted: float) -> dict[str, Tensor]:
    """Random tokens; of each sequence the last share `counted` has labels."""
    ids = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length - round(length * counted)] = -100
    return {"input_ids": ids, "labels": labels}


def stepper(variant: str, batch: dict[str, Tensor], bf16: bool) -> tuple[Callable[[], None], Result]:
    """A compiled step that has run twice."""
    import sptc
    from sptc.backend import spt

    options, model = VARIANTS[variant], make_model()
    compiled: Any = torch.compile(model) if options is None else torch.compile(model, backend=spt, options=options)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = compiled(**batch).loss
        loss.backward()
        for p in model.parameters():
            p.grad = None

    start = time.perf_counter()
    step()
    result = Result(variant, time.perf_counter() - start)
    if options is not None:
        result.rewritten = sum(r.status == "rewritten" for r in sptc.report(compiled).regions)
    step()
    return step, result


@contextmanager
def added_memory(result: Result) -> Iterator[None]:
    """The most memory of the process, sampled, beyond what it held before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that it does not count as resting
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        result.added_mib = (peak - before) / 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="bf16: autocast, for both sides (default: %(default)s)")
    parser.add_argument("--counted", type=float, default=1.0, help="share of the tokens with a label (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="beside inductor; may be repeated (default: all)")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 64  # a compile a variant
    batch = make_batch(arguments.batch, arguments.length, arguments.counted)
    names = ["inductor", *(v for v in arguments.variant or VARIANTS if v != "inductor")]
    made = {name: stepper(name, batch, arguments.dtype == "bf16") for name in names}
    for step, result in made.values():
        with added_memory(result):
            step()
    for _ in range(arguments.rounds):
        for step, result in made.values():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            result.cpu_seconds.append(time.process_time() - cpu)
            result.wall_seconds.append(time.perf_counter() - wall)
    results = [result for _, result in made.values()]
    least, memory = min(results[0].cpu_seconds), results[0].added_mib
    rows = []
    for r in results:
        fastest = min(r.cpu_seconds)
        figures = (
            f"{fastest:.3f}",
            f"{least / fastest:.2f}x",
            f"{r.added_mib:.0f}",
            f"{r.added_mib / memory:.2f}",
            f"{r.compile_seconds:.0f}",
        )
        rows.append((r.variant, r.rewritten, *figures))
    print(tabulate(rows, ("variant", "regions", "CPU s", "faster", "MiB added", "of inductor's", "first step s"), disable_numparse=True))
    if arguments.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        content = {"settings": settings, "torch": torch.__version__, "results": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
