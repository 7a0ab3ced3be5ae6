"""The house rules that a reader of the README relies on: links, the tree of the README, and what a wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("sptc", "passes", "codegen")
SOURCES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("room", ["passes", "codegen"])
def test_the_rooms_are_linked_into_the_package(room: str) -> None:
    link = ROOT / "sptc" / room
    assert link.is_symlink(), f"sptc/{room} is no link; check out on a file system with symbolic links (CONTRIBUTING.md)"
    assert os.readlink(link) == f"../{room}"


def test_import_without_triton_and_under_one_name() -> None:
    """In a process of its own: Triton can't be imported, and no room is loaded a second time under its bare name."""
    script = "import sys; sys.modules['triton'] = None; import sptc, sptc.backend; assert not {'passes', 'codegen'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def tree() -> list[str]:
    """Paths of the README's file tree, folders with a closing slash."""
    block = re.search(r"^```text\n(sptc/.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert block, "README.md has no file tree (a ```text block that starts with sptc/)"
    paths: list[str] = []
    folder = ""
    for line in block[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        folder = folder if indent else name
        paths.append(folder + name if indent else name)
    return paths


def test_readme_tree_is_the_tree() -> None:
    named = set(tree())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"README.md names {missing}, which are not there"
    modules = {str(path) for path in SOURCES if len(path.parts) == 2 and path.parts[0] in {"sptc", "passes"} and path.name != "__init__.py"}
    assert modules <= named, f"README.md does not name {sorted(modules - named)}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from a copy of its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "./source"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"sptc", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    expected = {Path("sptc", *(path.parts[1:] if path.parts[0] == "sptc" else path.parts)).as_posix() for path in SOURCES}
    native = {f"sptc/{path.relative_to(ROOT).as_posix()}" for suffix in ("cpp", "h") for path in (ROOT / "codegen").rglob(f"*.{suffix}")}
    assert native and {name for name in names if not name.split("/")[0].endswith(".dist-info")} == expected | native | {"sptc/py.typed"}


FACTORY = """
import sptc, torch

def ffn():
    print("from", sptc.__file__)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16)), torch.randn(64, 16)
"""


@pytest.mark.slow
def test_bench_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """With what is in the wheel alone: this checkout is not on the path, nor the current folder."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "factory_in_wheel.py").write_text(FACTORY)
    command = [sys.executable, "-m", "sptc.cli", "bench", "factory_in_wheel:ffn", "--only", "eager,half", "--steps", "3", "--once"]
    command += ["--variant", 'half={"ffn.density": 0.5, "decline": "never", "ffn.context_density": null}', "--html", "bench.html"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"from {tmp_path / 'installed' / 'sptc' / '__init__.py'}" in done.stdout
    assert "half is" in done.stdout and "1 of 1" in done.stdout and "commit unknown" in done.stdout
    assert (tmp_path / "work" / "bench.html").stat().st_size > 1000
