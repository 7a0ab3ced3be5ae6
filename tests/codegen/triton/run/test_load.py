"""Emitted files: where they lie, when they are written anew, what is refused; both forms of a kernel in one process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os

import pytest
import torch

from sptc.codegen.reference.random import keep_mask
from sptc.codegen.triton.spec import KernelSpec
from sptc.device.cache import CacheError

CPU = torch.device("cpu")
LONG = "x = 1\n" * 20000
PROBE = """
from sptc.codegen.triton.templates.attention.philox import philox_keep


@triton.jit
def largest(x):
    # Triton's own functions, directly and as methods.
    return tl.maximum(tl.max(x, axis=0), x.max(0)) + tl.sum(tl.zeros_like(x))


@triton.jit
def probe(out, seed_ptr, n, threshold, unread, BLOCK: tl.constexpr, UNREAD: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = philox_keep(seed_ptr, at, threshold)
    if UNREAD:
        keep = keep & (unread > 0)
    tl.store(out + at, tl.where(keep, 1, 0) * largest(tl.sigmoid(at * 0.0) * 2.0).to(tl.int32), mask=at < n)
"""


@pytest.fixture(autouse=True)
def probe(template):
    template("probe", PROBE)


def spec(block=32, unread=False):
    return KernelSpec.of("probe", {"BLOCK": block, "UNREAD": unread}, num_warps=2)


def loaded(*args, **kwargs):
    from sptc.codegen.triton.run.load import load

    return load(*args, **kwargs)


def run(kernel, n=100, p=0.3, seed=-(2**62) - 12345, **more):
    out = torch.full((n,), -1, dtype=torch.int32)
    arguments = {"out": out, "seed_ptr": torch.tensor([seed]), "n": n, "threshold": round(p * 2**32), **more}
    kernel.launch((-(-n // 32),), arguments, CPU)
    return out.bool()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_is_that_of_the_reference(p):
    seed = -(2**62) - 12345
    torch.testing.assert_close(run(loaded(spec(), interpret=True), p=p, seed=seed), keep_mask(torch.tensor(seed), torch.arange(100), p))


def test_large_indices_use_the_high_word(template):
    template(
        "far",
        "from sptc.codegen.triton.templates.attention.philox import philox_keep\n"
        "@triton.jit\ndef far(out, seed_ptr, index_ptr, threshold, N: tl.constexpr):\n    at = tl.arange(0, N)\n"
        "    tl.store(out + at, philox_keep(seed_ptr, tl.load(index_ptr + at), threshold))\n",
    )
    index = torch.arange(64) * (2**36 + 12345)
    out, seed = torch.zeros(64, dtype=torch.bool), torch.tensor([7])
    arguments = {"out": out, "seed_ptr": seed, "index_ptr": index, "threshold": 2**31}
    loaded(KernelSpec.of("far", {"N": 64}), interpret=True).launch((1,), arguments, CPU)
    torch.testing.assert_close(out, keep_mask(seed, index, 0.5))


def test_launch_passes_what_the_kernel_kept():
    kernel = loaded(spec(), interpret=True)
    assert kernel.parameters == ("out", "seed_ptr", "n", "threshold")
    torch.testing.assert_close(run(kernel, unread=None), run(kernel))
    with pytest.raises(TypeError, match=r"kernel 'probe' needs unread; see .*spt_probe"):
        run(loaded(spec(unread=True), interpret=True), unread=None)
    with pytest.raises(TypeError, match="needs seed_ptr, n, threshold"):
        kernel.launch((1,), {"out": torch.zeros(1)}, CPU)


def test_interpreted_and_compiled_forms_live_side_by_side():
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel
    from triton.runtime.jit import JITFunction

    zeros = tl.zeros
    interpreted, compiled = loaded(spec(), interpret=True), loaded(spec())
    assert compiled.path == interpreted.path and isinstance(compiled.function, JITFunction) and not compiled.interpreted
    run(interpreted)
    assert tl.zeros is zeros
    signature = {"out": "*i32", "seed_ptr": "*i64", "n": "i32", "threshold": "i64"}
    built = compile_kernel(
        ASTSource(fn=compiled.function, signature=signature, constexprs={}), target=GPUTarget("cuda", 90, 32), options=compiled.options
    )
    assert "philox" not in built.asm["ttir"].split("{", 1)[0] and ".entry probe" in built.asm["ptx"]
    torch.testing.assert_close(run(interpreted), keep_mask(torch.tensor(-(2**62) - 12345), torch.arange(100), 0.3))


def test_files_are_private_named_by_content_and_say_where_they_come_from(kernel_cache):
    kernel = loaded(spec(), origin="layers.3.ffn\nmodel.py:12")
    assert kernel.path.parent == kernel_cache and kernel.path.read_text() == kernel.source
    for folder in (kernel_cache, kernel_cache.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert kernel.path.stat().st_mode & 0o077 == 0
    head = kernel.source.split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "# layers.3.ffn\n# model.py:12" in head and "BLOCK=32" in head and "num_warps=2" in head
    assert loaded(spec()) is kernel
    assert loaded(spec(64)).path != kernel.path
    assert [path.suffix for path in kernel_cache.iterdir()] == [".py", ".py"]


@pytest.mark.parametrize("damage", ["shortened", "other", "binary", "header"])
def test_a_file_is_reused_only_if_its_body_is_right(damage, monkeypatch):
    from sptc.codegen.triton.run import load

    kernel = loaded(spec(), origin="first")
    text = kernel.path.read_text()
    if damage == "binary":
        kernel.path.write_bytes(b"\xff\xfe")
    else:
        changed = {"shortened": text[:-20], "other": text.replace("* 32", "* 33"), "header": text.replace("# first", "# second")}[damage]
        kernel.path.write_text(changed)
    monkeypatch.setattr(load, "_loaded", {})
    again = loaded(spec(), origin="third")
    assert ("# second" if damage == "header" else "# third") in again.source
    assert again.source == again.path.read_text() and again.source.partition("\n\n")[2] == text.partition("\n\n")[2]


@pytest.mark.parametrize("level", ["kernels", ""])
@pytest.mark.parametrize("fault", ["writable", "link", "owner"])
def test_a_folder_that_others_control_is_refused(fault, level, kernel_cache, tmp_path, monkeypatch):
    folder = kernel_cache if level else kernel_cache.parent
    folder.parent.mkdir(parents=True, mode=0o700)
    if fault == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
    if fault == "writable":
        folder.chmod(0o770)
    if fault == "owner":
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    reason = {"writable": r"others can write to it \(mode 0770\)", "link": "symbolic link", "owner": "belongs to user"}[fault]
    with pytest.raises(CacheError, match=f"{reason}.*XDG_CACHE_HOME"):
        loaded(spec())
    assert not list(tmp_path.glob("**/spt_*"))


def emit_often(count):
    from sptc.codegen.triton.run.load import emit

    for i in range(count):
        path = emit(KernelSpec("probe", ()), LONG)
        if i % 3 == 0:
            path.unlink(missing_ok=True)
    emit(KernelSpec("probe", ()), LONG)


def test_several_processes_write_the_same_file(kernel_cache):
    workers = [multiprocessing.get_context("fork").Process(target=emit_often, args=(60,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for path in kernel_cache.glob("*.py"):
            with contextlib.suppress(FileNotFoundError):
                assert path.read_text().endswith("\n\n" + LONG)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    [path] = kernel_cache.iterdir()
    assert path.read_text().endswith("\n\n" + LONG)
