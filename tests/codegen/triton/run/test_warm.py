"""Kernels compiled before a run: by other processes, into the cache that the launch looks into, with what Triton launches them by."""

import ctypes
import re
import subprocess
from dataclasses import replace

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.runtime import build as c_compiler

from bench.gpu.sizes import DRY
from bench.kernels import ahead
from bench.kernels.warm import build_launcher, distinct, warm
from sptc.codegen.triton.run import aot
from sptc.codegen.triton.run.load import load
from sptc.codegen.triton.target import KNOWN

TARGET = KNOWN["sm_90"]


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """Two short kernels, and an empty cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    found = ahead.launches(DRY.attention[0], TARGET, torch.float16)
    return [next(launch for launch in found if launch.spec.template == name) for name in ("run_means", "choose_blocks")]


def test_other_processes_fill_the_cache(launches, tmp_path):
    """Each kernel once; one that does not compile is told of, and the others are there."""
    bad = replace(launches[0], arguments=dict.fromkeys(launches[0].arguments, 3))  # numbers where the kernel loads from pointers
    results = list(warm([bad, *launches, *launches], TARGET, 2))
    assert sorted(r.template for r in results) == ["choose_blocks", "run_means", "run_means"]
    [wrong] = (r for r in results if r.error)
    assert "CompilationError" in wrong.error and all(r.seconds > 0 for r in results if r is not wrong)
    assert {path.stem for path in (tmp_path / "triton").rglob("*.cubin")} == {"choose_blocks", "run_means"}


def test_a_launch_finds_its_kernel(launches, monkeypatch):
    """Triton's own way from arguments to compiled code, as far as it goes without a device."""

    class Device:
        launcher_cls = None

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget(TARGET.backend, TARGET.arch, TARGET.warp_size)

    list(warm(launches, TARGET, 1))
    hits = []
    monkeypatch.setattr(triton.runtime.driver, "_active", Device())
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        for launch in launches:
            kernel = load(launch.spec)
            chosen = {name: launch.arguments[name] for name in kernel.parameters}
            kernel.function.run(grid=launch.grid, warmup=True, **chosen, **kernel.options)
    assert hits == [True, True]


def test_launchers_are_compiled_too(launches, tmp_path, monkeypatch):
    """Triton 3.6 has one for each signature, and finds it in its cache by the signature; later ones need none."""
    kernel = aot.build(launches[0], TARGET)
    if not hasattr(driver, "make_launcher"):
        assert not build_launcher(kernel)
        return
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", driver.make_launcher({}, {}, None))))
    source, library = tmp_path / "libcuda.c", tmp_path / "libcuda.so.1"  # the driver's, as far as a launcher is linked with it
    source.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in names))
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    monkeypatch.setattr(driver, "library_dirs", lambda: [str(tmp_path)])
    assert build_launcher(kernel)
    assert len(list((tmp_path / "triton").rglob("__triton_launcher*"))) == 1
    monkeypatch.setattr(c_compiler, "_build", None)
    assert build_launcher(kernel)


def test_what_triton_compiles_alike_is_compiled_once(launches):
    launch = launches[0]
    name, number = next((n, v) for n, v in launch.arguments.items() if isinstance(v, int) and v % 16 and v != 1)
    others = [replace(launch, arguments={**launch.arguments, name: value}) for value in (number + 16, 1, 48, 2**33 + 1)]
    assert len(distinct([launch, *others])) == 4
