"""Compiling recorded launches for an architecture that need not be here, and reading what the result uses of it.

The signature is the one that the just-in-time compiler derives from the arguments, with its specialisations (integers equal to 1, pointers
and integers divisible by 16), so that what is checked here is what runs there.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from sptc.codegen.triton.run.launch import Argument, Launch
from sptc.codegen.triton.run.load import Kernel, load
from sptc.codegen.triton.spec import KernelSpec
from sptc.codegen.triton.target import Target

_WARPGROUP = r"\bwgmma\.mma_async\.sync\b|\btcgen05\.mma\b"
_MATRIX = {"ptx": rf"{_WARPGROUP}|\bmma\.sync\b", "amdgcn": r"^\s*v_mfma_"}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target: its assembly ("ptx" or "amdgcn"), its binary, and the shared memory it is launched with."""

    spec: KernelSpec
    language: str
    assembly: str
    binary: bytes
    shared_memory: int


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    `spilled` is thread-private memory, in bytes: 0 unless values did not fit in registers. `warpgroup_instructions` are those of the matrix
    instructions that four warps issue together (wgmma, tcgen05): from sm_90 on mma.sync falls short of the full rate.
    """

    registers: int
    spilled: int
    shared_memory: int
    matrix_instructions: int
    warpgroup_instructions: int


def build(launch: Launch, target: Target) -> CompiledKernel:
    """What Triton makes of the kernel of `launch` for `target`; its tensors may be on "meta". Triton's cache has it from then on.

    Raises:
        TypeError, KeyError: an argument that no kernel can be given.
        triton.CompilationError: the emitted kernel is not valid Triton.
    """
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    source, options = _source(load(launch.spec), launch.arguments, gpu)
    return triton.compile(source, target=gpu, options=options)


def compile_ahead(launch: Launch, target: Target) -> Compiled:
    """Compile the kernel of `launch` for `target`, as `build` does, and keep what tells of it."""
    built = build(launch, target)
    language, binary = ("ptx", "cubin") if target.backend == "cuda" else ("amdgcn", "hsaco")
    return Compiled(launch.spec, language, built.asm[language], built.asm[binary], built.metadata.shared)


def resources(compiled: Compiled) -> Resources:
    """Registers, thread-private memory, shared memory and matrix instructions of a compiled kernel."""
    matrix = len(re.findall(_MATRIX[compiled.language], compiled.assembly, re.MULTILINE))
    if compiled.language == "ptx":
        usage = _cubin_usage(compiled.binary)
        private, shared = usage["STACK"] + usage["LOCAL"], compiled.shared_memory + usage["SHARED"]
        return Resources(usage["REG"], private, shared, matrix, len(re.findall(_WARPGROUP, compiled.assembly)))
    counts = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", compiled.assembly, re.MULTILINE)}
    spilled = max(counts["private_segment_fixed_size"], 4 * counts["vgpr_spill_count"])
    return Resources(counts["vgpr_count"], spilled, compiled.shared_memory, matrix, 0)


def _source(kernel: Kernel, arguments: Mapping[str, Argument], gpu: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What JITFunction.run hands to the compiler, by its own steps: the result is then found in Triton's cache when it runs."""
    function, backend = kernel.function, make_backend(gpu)
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, rest = bind(**{name: arguments[name] for name in kernel.parameters}, **kernel.options)
    options, signature, constants, attributes = function._pack_args(backend, kernel.options, bound, specialization, rest)
    return ASTSource(function, signature, constants, attributes), options.__dict__


@functools.lru_cache(maxsize=1024)
def _cubin_usage(binary: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    if "REG" not in usage:
        raise RuntimeError(f"cuobjdump --dump-resource-usage printed no registers: {text!r}")
    return usage
