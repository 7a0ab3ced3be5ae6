"""What a training step adds to a model's memory on a CPU, Inductor against "spt": `python -m bench.memory [--case NAME] [--variant NAME]`.

Each variant of each case runs in a process of its own, one after the other. Measured are steps after the first two, forward, loss and
backward without the optimizer: the most memory that the process holds beyond what it holds at rest, with the allocator trimmed before;
and processor time, the least of a few steps. Memory does not depend on what else the machine does; times do.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from bench.step import RANK, make_batch, make_model

EXACT = {"attention.enabled": False, "ffn.enabled": False, "loss.logits": "drop"}
SPARSE = {"loss.logits": "drop", "ffn.density": 1.0, "ffn.context_density": 0.25}

VARIANTS: dict[str, dict[str, Any] | None] = {
    "inductor": None,
    "loss": EXACT,  # the loss alone: exact
    "spt": SPARSE,  # and attention at 1/8, and FFNs at 1/4 for tokens whose label does not count
}


@dataclass(frozen=True)
class Case:
    """A model with LoRA on its layers, and a batch."""

    family: str  # "gpt2" or "qwen2"
    batch: int
    length: int
    counted: float  # share of the tokens with a label
    bf16: bool = False  # autocast
    checkpointing: bool = False


CASES = {
    "gpt2": Case("gpt2", 4, 512, 1.0),
    "gpt2, a quarter": Case("gpt2", 4, 512, 0.25),
    "gpt2, checkpointing": Case("gpt2", 4, 512, 1.0, checkpointing=True),
    "qwen2, fp32": Case("qwen2", 2, 1024, 1.0),
    "qwen2, bf16": Case("qwen2", 2, 1024, 1.0, bf16=True),
}


@dataclass
class Result:
    """Of one variant of one case."""

    case: str
    variant: str
    losses: str  # how many losses were rewritten, and what became of the others
    rest_mib: float  # the process between steps
    added_mib: float  # at most, during a step
    cpu_seconds: float
    loss: float


def gpt2() -> nn.Module:
    """4 layers of GPT-2's sizes, with its vocabulary, in one graph with its loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it takes anyway, after a warning that would break the graph before the loss
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def measure(name: str, variant: str, rounds: int) -> Result:
    """Compile and run one variant of a case in this process."""
    import sptc
    from sptc.backend import spt

    torch.set_num_threads(1)
    case, options = CASES[name], VARIANTS[variant]
    model = gpt2() if case.family == "gpt2" else make_model()
    if case.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    batch = make_batch(case.batch, case.length, case.counted)
    compiled: Any = torch.compile(model) if options is None else torch.compile(model, backend=spt, options=options)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
            loss = compiled(**batch).loss
        loss.backward()
        for p in model.parameters():
            p.grad = None
        return float(loss.detach())

    step()
    step()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    rest, added, loss = 0.0, 0.0, 0.0
    for _ in range(2):
        rest = _trimmed()
        loss = step()
        added = max(added, _kib("VmHWM") / 1024 - rest)
    rows = [] if options is None else [r for r in sptc.report(compiled).regions if r.kind == "loss"]
    told = ", ".join(r.status if r.rule is None else f"{r.status} [{r.rule}]" for r in rows)
    return Result(name, variant, told, rest, added, min(seconds), loss)


def _trimmed() -> float:
    """MiB that the process holds, after what was freed is given back; its peak counts from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _kib("VmRSS") / 1024


def _kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated (default: all)")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="beside inductor; may be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    parser.add_argument("--here", action="store_true", help="one case and one variant in this process; prints JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(asdict(measure(arguments.case[0], arguments.variant[0], arguments.rounds))))
        return
    names = ["inductor", *(v for v in arguments.variant or VARIANTS if v != "inductor")]
    rows, results = [], []
    for case in arguments.case or CASES:
        base: Result | None = None
        for variant in names:
            command = [
                sys.executable,
                "-m",
                "bench.memory",
                "--here",
                "--case",
                case,
                "--variant",
                variant,
                "--rounds",
                str(arguments.rounds),
            ]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = Result(**json.loads(output.splitlines()[-1]))
            base = base or result
            results.append(result)
            figures = (result.rest_mib, result.added_mib)
            ratios = (result.added_mib / base.added_mib, result.cpu_seconds / base.cpu_seconds)
            rows.append((case, variant, result.losses, *(f"{f:.0f}" for f in figures), *(f"{r:.2f}" for r in ratios), f"{result.loss:.5f}"))
            print(tabulate(rows, _HEADERS, disable_numparse=True), flush=True)
    if arguments.json:
        content = {"torch": torch.__version__, "results": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


_HERE = (sys.executable, "-m", "bench.memory", "--here")
_HEADERS = ("case", "variant", "loss", "MiB at rest", "a step adds", "of inductor's", "CPU time of its", "value")

if __name__ == "__main__":
    main()
