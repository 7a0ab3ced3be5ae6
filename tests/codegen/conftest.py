"""Templates of a test's own, beside the real ones, an empty kernel cache, and memory that starts as nan."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sptc.codegen.triton.source import specialize as specialize_module


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Whatever an op leaves unwritten becomes a nan, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of emitted kernels, which does not exist yet; nothing is loaded."""
    from sptc.codegen.triton.run import load

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "_loaded", {})
    return tmp_path / "cache" / "sptc" / "kernels"


@pytest.fixture
def template(kernel_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """template(name, source) writes a template; sources start after the imports."""
    folder = tmp_path / "templates"
    shutil.copytree(specialize_module.TEMPLATES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(specialize_module, "TEMPLATES", folder)
    specialize_module.specialize.cache_clear()

    def write(name: str, source: str) -> None:
        (folder / f"{name}.py").write_text("import triton\nimport triton.language as tl\n" + source)

    return write
