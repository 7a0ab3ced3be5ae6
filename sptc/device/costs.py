"""What a device can do, measured once: the constants of the cost model in `passes/decide/cost.py`.

The measurements (`sptc/device/measure.py`) are kept in a private cache folder (`$XDG_CACHE_HOME/sptc` or `~/.cache/sptc`), one file for
each processor or GPU, torch version and version of the kernels. A file that cannot be read is measured anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sptc.config import ConfigError
from sptc.device.cache import cache_folder, private_folder, write_whole
from sptc.device.measure import measure

log = logging.getLogger(__name__)

Blocks = Callable[[int, int, float, bool], tuple[int, int]]


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in one dtype, of all threads."""

    gemm: float  # a large product
    attention: float  # scaled_dot_product_attention, forward
    attention_backward: float
    row_seconds: float = (
        0.0  # what it takes for each query of each head besides its products, forward and backward: much in short sequences
    )


@dataclass(frozen=True)
class DeviceCosts:
    """What the cost model knows of a device. Rates are per second, of all threads; attention's in fp32 on a CPU, in bf16 on a GPU."""

    single: Rates
    half: Rates
    bandwidth: float  # bytes read or written, out of cache
    exponentials: float
    sparse_attention: float  # FLOPs of sptc::sparse_attention at density 1/8, gathers and softmax included
    sparse_attention_backward: float
    pooled: float  # (mean query, key) pairs of the pooled selector, for one element of the head size
    coded: float  # (vector, codeword) pairs of the pq selector, for one element of the head size
    op_seconds: float  # a small operator
    attention_seconds: float  # sparse attention of next to nothing, selection, forward and backward; `calls` says how often
    default_blocks: Blocks  # (queries, keys, density, whether a tile owns blocks) -> (query_block, key_block)
    gpu: bool = False
    bf16_gain: float = 1.0  # by what a CPU's sparse attention is faster in bf16, forward
    bf16_gain_backward: float = 1.0
    dtypes: frozenset[torch.dtype] = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})  # that it computes in

    def rates(self, dtype: torch.dtype | None) -> Rates:
        return self.half if dtype in (torch.bfloat16, torch.float16) else self.single

    def calls(self, pieces: Any) -> Any:
        """How often the fixed time of a sparse op is spent on `pieces` rows of a batch or blocks of an FFN.

        A CPU takes one piece after another. A GPU's kernels take all of them in one launch, whose cost is the host's and does not grow.
        """
        return 1 if self.gpu else pieces

    def sparse_slowdown(self, dtype: torch.dtype | None) -> tuple[float, float, float]:
        """By what sparse attention in `dtype` is slower than the measured rates, forward and backward, and choosing its keys.

        A CPU may multiply bf16 faster, and chooses in fp32. A GPU's products in fp32 are taken to be slower than those in bf16 by as much
        as the dense ones.
        """
        if not self.gpu:
            return (1 / self.bf16_gain, 1 / self.bf16_gain_backward, 1.0) if dtype == torch.bfloat16 else (1.0, 1.0, 1.0)
        rates = self.rates(dtype)
        forward = self.half.attention / rates.attention
        return forward, self.half.attention_backward / rates.attention_backward, forward


_RATIOS = {"bf16_gain", "bf16_gain_backward"}
_NUMBERS = {f.name for f in fields(DeviceCosts)} - {"single", "half", "default_blocks", "gpu", "dtypes"}


def check_device(device: torch.device) -> None:
    """Raises ConfigError for a device that this version has no kernels for."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"backend 'spt': no kernels for device {str(device)!r} in this version; "
            "move the model and its inputs to a CUDA GPU or the CPU, or compile with another backend"
        )


def calibrate(device: torch.device, default_blocks: Blocks) -> DeviceCosts:
    """The constants of `device`, from the cache or measured now. Global state (random numbers, autocast, grad mode) is left alone.

    Args:
        device: one that `check_device` accepts.
        default_blocks: (queries, keys, density, whether a tile owns blocks) -> (query_block, key_block) of the device's kernels.
    """
    check_device(device)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return _costs(_constants(_key(device), device), threads, default_blocks, gpu=device.type != "cpu")


def _costs(values: Mapping[str, Any], threads: int, default_blocks: Blocks, gpu: bool = False) -> DeviceCosts:
    """The constants of one thread, for `threads` of them."""
    scaled = {name: values[name] * threads for name in _NUMBERS - _RATIOS if not name.endswith("seconds")}
    single, half = (
        Rates(**{key: value / threads if key.endswith("seconds") else value * threads for key, value in values[name].items()})
        for name in ("single", "half")
    )
    return DeviceCosts(**{**values, **scaled, "single": single, "half": half}, default_blocks=default_blocks, gpu=gpu)


def _key(device: torch.device) -> str:
    name = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    parts = [name, _fp32_products(device), torch.__version__, _kernel_sources()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _fp32_products(device: torch.device) -> str:
    """How fp32 products are computed, which the user switches: in TF32 or not on a GPU, by oneDNN or by MKL on a CPU. That is a multiple
    in speed, and dense and sparse ones follow it."""
    if device.type == "cpu":
        onednn: Any = torch.backends.mkldnn
        return "oneDNN" if onednn.matmul.fp32_precision == "bf16" else ""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kept = {line for line in lines if line.startswith(("model", "cpu family", "flags", "CPU part", "CPU implementer", "Features"))}
    return "\n".join(sorted(kept))


@functools.cache
def _kernel_sources() -> str:
    """A digest of the kernels and of how they are measured: a faster kernel is a reason to measure again."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    kernels = sorted(path for path in (here.parent / "codegen").glob("**/*") if path.suffix in (".py", ".cpp", ".h"))
    for path in [Path(__file__), here / "measure.py", *kernels]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _constants(key: str, device: torch.device) -> dict[str, Any]:
    path = cache_folder() / f"device-{key}.json"
    values = _load(path)
    if values is None:
        values = measure(device)
        _save(path, values)
    return values


def _load(path: Path) -> dict[str, Any] | None:
    """The constants in `path`; None if it is missing or holds anything else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    rates = {f.name for f in fields(Rates)}

    def holds(mapping: Any, names: set[str]) -> bool:
        return isinstance(mapping, dict) and all(isinstance(mapping.get(n), float) and 0 < mapping[n] < math.inf for n in names)

    if not holds(values, _NUMBERS) or values.keys() != _NUMBERS | {"single", "half"}:
        return None
    if not all(holds(values[name], rates) and values[name].keys() == rates for name in ("single", "half")):
        return None
    return values


def _save(path: Path, values: dict[str, Any]) -> None:
    """Write whole or not at all. Without a place to write, the constants last for this process."""
    try:
        write_whole(private_folder() / path.name, json.dumps(values, indent=1))
    except OSError as error:
        log.warning("cannot keep the device's measurements in %s (%s): they are taken again by the next process", path.parent, error)
