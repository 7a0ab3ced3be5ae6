"""From a spec to a kernel that runs: its source in a private file, imported, launched with the parameters that it kept.

Imports Triton, so nothing imports this before the first launch. Files are named by what they hold, so that equal kernels of all models
and processes share one, and Triton's own cache of compiled code stays valid.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import linecache
import sys
import textwrap
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from sptc.codegen.triton.run.interpreter import interpreting, make_plain
from sptc.codegen.triton.run.launch import Argument, Grid
from sptc.codegen.triton.source.specialize import specialize
from sptc.codegen.triton.spec import KernelSpec
from sptc.device.cache import private_folder, write_whole

_loaded: dict[tuple[KernelSpec, bool], Kernel] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Kernel:
    """An emitted kernel. `function` is Triton's: a JITFunction, or an InterpretedFunction that runs on CPU tensors."""

    spec: KernelSpec
    path: Path
    source: str
    parameters: tuple[str, ...]
    function: Any = field(repr=False)

    @property
    def interpreted(self) -> bool:
        return isinstance(self.function, InterpretedFunction)

    @property
    def options(self) -> dict[str, Any]:
        """Triton's compile options. Fusion of multiply and add is what all versions do by default, but not all without being told."""
        return {"num_warps": self.spec.num_warps, "num_stages": self.spec.num_stages, "enable_fp_fusion": True}

    def launch(self, grid: Grid, arguments: Mapping[str, Argument | None], device: torch.device) -> None:
        """Run it. `arguments` may hold more than the kernel kept.

        Raises:
            TypeError: a parameter has no argument, or None.
        """
        chosen = {name: arguments.get(name) for name in self.parameters}
        if missing := [name for name, value in chosen.items() if value is None]:
            raise TypeError(f"kernel {self.spec.template!r} needs {', '.join(missing)}; see {self.path}")
        with interpreting() if self.interpreted else torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.function[grid](**chosen, **self.options)


def load(spec: KernelSpec, interpret: bool = False, origin: str = "") -> Kernel:
    """The kernel of `spec`, emitted and imported on the first call.

    Args:
        interpret: for Triton's interpreter; both forms of a kernel can live in one process.
        origin: what it was made for, such as a region, its source line and its shapes; for readers only.

    Raises:
        SpecializeError: the spec does not fit its template.
        CacheError: the cache folder cannot be trusted.
    """
    with _lock:
        if (spec, interpret) not in _loaded:
            body = specialize(spec)
            path = emit(spec, body, origin)
            _loaded[spec, interpret] = _import(spec, path, body, interpret)
        return _loaded[spec, interpret]


def emit(spec: KernelSpec, body: str, origin: str = "") -> Path:
    """Write the module to the cache, unless it is there: the header may differ, the body must not."""
    digest = hashlib.sha256("\n".join([body, _version(), triton.__version__]).encode()).hexdigest()
    path = private_folder("kernels") / f"spt_{spec.template}_{digest[:24]}.py"
    if _body(path) != body:
        write_whole(path, header(spec, origin) + body)
    return path


def header(spec: KernelSpec, origin: str = "") -> str:
    """Comment lines that say where a module comes from, and an empty line."""
    constants = ", ".join(f"{name}={value!r}" for name, value in spec.constants)
    lines = [
        f"Emitted by sptc {_version()} for Triton {triton.__version__} from codegen/triton/templates/{spec.template}.py.",
        f"num_warps={spec.num_warps}, num_stages={spec.num_stages}",
        *textwrap.wrap(f"constants: {constants or 'none'}", 108, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False),
        *(f"{name}: {text}" for name, text in spec.hooks),
        *origin.splitlines(),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


def _body(path: Path) -> str | None:
    """What follows the header of a file; None if there is no such file."""
    try:
        text = path.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    lines = text.splitlines(keepends=True)
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[count + 1 :])


def _import(spec: KernelSpec, path: Path, body: str, interpret: bool) -> Kernel:
    name = f"sptc.emitted.{path.stem}" + ("_interpreted" if interpret else "")
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # a path that ends in .py has a loader
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # inspect.getsource, which Triton uses, looks here
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpret  # read when a function is decorated
        source = path.read_text()
        # Triton asks `inspect` for the lines: those that are compiled here, whatever another process writes to the file meanwhile.
        linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
        # Compiled from what was read here: Python's own loader would leave .pyc files, which go by a time stamp in whole seconds.
        exec(compile(source, str(path), "exec"), module.__dict__)
    if interpret:
        make_plain(module, spec.template)
    [function] = (node for node in ast.parse(body).body if isinstance(node, ast.FunctionDef) and node.name == spec.template)
    return Kernel(spec, path, source, tuple(arg.arg for arg in function.args.args), getattr(module, spec.template))


def _version() -> str:
    try:
        return metadata.version("sptc")
    except metadata.PackageNotFoundError:
        return "from source"
