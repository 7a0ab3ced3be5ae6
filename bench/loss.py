"""A loss alone on a CPU, forward and backward, against what else there is: `python -m bench.loss [--counted 0.25] [--bf16]`.

2048 rows of 768 features onto 50,257 classes, the weight frozen, as in LoRA. Each way runs in a process of its own, on one thread: the
least processor time of a few runs, and the most memory that a run adds to what the process holds before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from sptc.device.heap import give_back

ROWS, FEATURES, CLASSES = 2048, 768, 50257

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def chunked(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Torch's own, from 2.13 on."""
    from torch.nn import LinearCrossEntropyOptions

    return F.linear_cross_entropy(x, weight, labels, options=LinearCrossEntropyOptions())


def compiled(**options: Any) -> Loss:
    return torch.compile(plain, options=options)


def rewritten() -> Loss:
    from sptc.backend import spt

    return torch.compile(plain, backend=spt)


WAYS: dict[str, Callable[[], Loss]] = {
    "torch, eager": lambda: plain,
    "torch, linear_cross_entropy in chunks": lambda: chunked,
    "Inductor": compiled,
    "Inductor, auto_chunker": lambda: compiled(**{"auto_chunker.enable": True}),
    "spt": rewritten,
}


def measure(way: str, counted: float, bf16: bool, rounds: int) -> dict[str, float]:
    """Seconds of the processor, MiB added, and the loss, of one way in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind = torch.bfloat16 if bf16 else torch.float32
    x, weight = torch.randn(ROWS, FEATURES).to(kind), (0.02 * torch.randn(CLASSES, FEATURES)).to(kind)
    labels = torch.randint(CLASSES, (ROWS,)).masked_fill(torch.arange(ROWS) >= round(counted * ROWS), -100)
    loss = WAYS[way]()

    def run() -> float:
        given = x.clone().requires_grad_()
        result = loss(given, weight, labels)
        result.backward()
        return float(result.detach())

    value, seconds, added = run(), [], []
    for _ in range(rounds):
        give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        rest, start = _status("VmRSS"), time.process_time()
        value = run()
        seconds.append(time.process_time() - start)
        added.append(_status("VmHWM") - rest)
    return {"seconds": min(seconds), "added": max(added), "value": value}


def _status(field: str) -> float:
    """A figure of Linux about this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__)
    parser.add_argument("--counted", type=float, default=1.0, help="share of the rows with a label (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="rows and weight in bf16 (default: fp32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", action="append", choices=WAYS, help="may be repeated (default: all)")
    parser.add_argument("--here", action="store_true", help="one way in this process; prints JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.way[0], arguments.counted, arguments.bf16, arguments.rounds)))
        return
    rows = []
    for way in arguments.way or WAYS:
        command = [sys.executable, "-m", "bench.loss", "--here", "--way", way, "--counted", str(arguments.counted)]
        command += ["--rounds", str(arguments.rounds), *(["--bf16"] if arguments.bf16 else [])]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        rows.append((way, f"{result['seconds']:.2f}", f"{result['added']:.0f}", f"{result['value']:.5f}"))
    print(tabulate(rows, ("way", "CPU s", "MiB added", "loss"), disable_numparse=True))


if __name__ == "__main__":
    main()
