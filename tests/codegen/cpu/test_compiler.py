"""C++ kernels are compiled once, whole, and say what is wrong when they cannot be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sptc.codegen.cpu import compiler
from sptc.device.cache import private_folder

_SOURCE = 'extern "C" long twice(long x) { return 2 * x; }'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return private_folder("native")


def test_a_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.library(_SOURCE, {}).twice(21) == 42
    (made,) = cache.iterdir()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled twice"))
    assert compiler.library(_SOURCE, {}).twice(4) == 8
    assert list(cache.iterdir()) == [made]


def test_macros_and_sources_tell_libraries_apart(cache: Path) -> None:
    source = 'extern "C" int value() { return VALUE; }'
    assert [compiler.library(source, {"VALUE": value}).value() for value in ("1", "2", "1")] == [1, 2, 1]
    assert len(list(cache.iterdir())) == 2


def test_what_the_compiler_says_is_shown_and_nothing_is_left(cache: Path) -> None:
    with pytest.raises(compiler.CompilerError, match="undeclared_thing"):
        compiler.library('extern "C" int value() { return undeclared_thing; }', {})
    assert not list(cache.iterdir())


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("no compiler")

    compiler._compiler.cache_clear()
    monkeypatch.setattr(compiler, "get_cpp_compiler", none)
    with pytest.raises(compiler.CompilerError, match=r"install g\+\+"):
        compiler.library(_SOURCE, {})
    compiler._compiler.cache_clear()


def test_a_folder_that_others_can_write_to_is_refused(cache: Path) -> None:
    cache.chmod(0o777)
    with pytest.raises(OSError, match="chmod 700"):
        compiler.library(_SOURCE, {})
