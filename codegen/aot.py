"""Compiling recorded launches for an architecture that need not be here, and reading what the result uses of it.

The signature is the one the just-in-time compiler would derive from the arguments, with its specialisations (integers equal to 1, pointers
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

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sptc.codegen.launch import Argument, Launch
from sptc.codegen.load import load
from sptc.codegen.spec import KernelSpec
from sptc.codegen.target import Target

_POINTERS = {
    torch.bool: "*u1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
_DIVISIBLE = ["tt.divisibility", 16]
_NARROW = ["tt.pointer_range", 32]  # lets AMD's backend use buffer instructions
_MATRIX = {"ptx": r"\b(?:wgmma\.)?mma(?:_async)?\.sync|\btcgen05\.mma\b", "amdgcn": r"^\s*v_mfma_"}


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
    """What a compiled kernel uses. `spilled` is thread-private memory, in bytes: 0 unless values did not fit in registers."""

    registers: int
    spilled: int
    shared_memory: int
    matrix_instructions: int


def compile_ahead(launch: Launch, target: Target) -> Compiled:
    """Compile the kernel of `launch` for `target`; its tensors may be on "meta".

    Raises:
        TypeError: an argument that no kernel can be given.
        triton.CompilationError: the emitted kernel is not valid Triton.
    """
    function = load(launch.spec).function
    options = {"num_warps": launch.spec.num_warps, "num_stages": launch.spec.num_stages}
    kernel = triton.compile(
        _source(function, launch.arguments, target), target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
    )
    language, binary = ("ptx", "cubin") if target.backend == "cuda" else ("amdgcn", "hsaco")
    return Compiled(launch.spec, language, kernel.asm[language], kernel.asm[binary], kernel.metadata.shared)


def resources(compiled: Compiled) -> Resources:
    """Registers, thread-private memory, shared memory and matrix instructions of a compiled kernel."""
    matrix = len(re.findall(_MATRIX[compiled.language], compiled.assembly, re.MULTILINE))
    if compiled.language == "ptx":
        usage = _cubin_usage(compiled.binary)
        return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.shared_memory + usage["SHARED"], matrix)
    counts = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", compiled.assembly, re.MULTILINE)}
    spilled = max(counts["private_segment_fixed_size"], 4 * counts["vgpr_spill_count"])
    return Resources(counts["vgpr_count"], spilled, compiled.shared_memory, matrix)


def _source(function: Any, arguments: Mapping[str, Argument], target: Target) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], int] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(function.params):
        value = arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if specialised and isinstance(value, int) and not isinstance(value, bool) and value == 1:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = 1
            continue
        signature[parameter.name] = _type(parameter.name, value)
        found = _attributes(value, target) if specialised else []
        if found:
            attributes[(i,)] = found
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)


def _type(name: str, value: Argument) -> str:
    if isinstance(value, Tensor):
        if value.dtype in _POINTERS:
            return _POINTERS[value.dtype]
        raise TypeError(f"argument {name!r} of a kernel is a tensor of {value.dtype}, which Triton has no pointer type for")
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"argument {name!r} of a kernel is {value!r}; kernels take tensors and plain numbers")


def _attributes(value: Argument, target: Target) -> list[list[Any]]:
    if isinstance(value, Tensor):
        found = [_DIVISIBLE] if value.storage_offset() * value.element_size() % 16 == 0 else []  # storages are aligned
        narrow = target.backend == "hip" and value.untyped_storage().size() < 2**31
        return [*found, _NARROW] if narrow else found
    return [_DIVISIBLE] if isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0 else []


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
