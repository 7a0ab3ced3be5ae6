"""The rooms: who may import whom, how many entries a folder has, and what its door says. docs/architecture.md explains them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for top in ("sptc", "passes", "codegen") for path in (ROOT / top).rglob("*.py") if "__pycache__" not in path.parts)
FOLDERS = sorted({path.parent for path in SOURCES})
ERRORS = "sptc.ir.errors"  # the base class of errors, for all rooms
MOST = 12  # entries of a folder, beside its __init__.py and the links of sptc/

# What a room may import of this package beside itself and the folders in it: rooms, or single modules.
MAY = {
    "sptc": {"*"},  # backend.py and cli.py: the story, and the commands
    "sptc.ir": {"sptc.config", "sptc.device.cache"},
    "sptc.device": {"sptc.config"},
    "sptc.device.measure": {"sptc.codegen"},
    "sptc.model": {"sptc.config", "sptc.paper.state", "sptc.reports.report"},
    "sptc.paper": {"sptc.config", "sptc.ir"},
    "sptc.paper.prepare": {"sptc.backend", "sptc.model", "sptc.passes", "sptc.reports.report"},
    "sptc.paper.saved": {"sptc.device.cache"},
    "sptc.paper.trial": {"sptc.passes"},
    "sptc.plans": {"sptc.backend", "sptc.config", "sptc.ir", "sptc.model", "sptc.passes"},
    "sptc.plans.beside": {"sptc.device.products"},
    "sptc.plans.rise": {"sptc.device.heap"},
    "sptc.reports": {"sptc.config", "sptc.ir", "sptc.passes"},
    "sptc.reports.dump": {"sptc.device.cache"},
    "sptc.reports.explain": {"sptc.backend", "sptc.model", "sptc.plans.rise"},
    "sptc.reports.emit": {"sptc.codegen"},
    "sptc.benchmark": {"sptc.config", "sptc.device", "sptc.ir", "sptc.model"},
    "sptc.benchmark.child": {"sptc.backend", "sptc.benchmark", "sptc.device.heap", "sptc.model", "sptc.paper.prepare"},
    "sptc.benchmark.show": {"sptc.benchmark"},
    "sptc.passes": {"sptc.config", "sptc.ir", "sptc.paper.state"},
    "sptc.passes.graph": {"sptc.ir"},
    "sptc.passes.mask": {"sptc.ir", "sptc.passes.graph"},
    "sptc.passes.find": {"sptc.config", "sptc.ir", "sptc.passes.graph", "sptc.passes.mask", "sptc.passes.unit"},
    "sptc.passes.normalize": {"sptc.ir", "sptc.passes.graph", "sptc.passes.mask", "sptc.passes.unit"},
    "sptc.passes.normalize.unmerge_heads": {"sptc.passes.find"},  # which products are attention's is for `find` to say
    "sptc.passes.decide": {"sptc.config", "sptc.device.costs", "sptc.ir", "sptc.passes.find", "sptc.passes.graph", "sptc.passes.unit"},
    "sptc.passes.rewrite": {"sptc.ir", "sptc.paper.fit", "sptc.passes.find", "sptc.passes.graph", "sptc.passes.unit"},
    "sptc.codegen": set(),
    "sptc.codegen.ops": {"sptc.codegen", "sptc.ir"},
    "sptc.codegen.ops.block_products": {"sptc.device.products"},
    "sptc.codegen.reference": {"sptc.ir"},
    "sptc.codegen.cpu": {"sptc.codegen.reference", "sptc.device", "sptc.ir"},
    "sptc.codegen.cpu.native": set(),
    "sptc.codegen.triton": set(),
    "sptc.codegen.triton.launchers": {"sptc.codegen.reference", "sptc.codegen.triton", "sptc.ir"},
    "sptc.codegen.triton.run": {"sptc.codegen.triton", "sptc.device.cache"},
    "sptc.codegen.triton.source": {"sptc.codegen.triton.spec", "sptc.ir"},
    "sptc.codegen.triton.templates": set(),
    "sptc.codegen.triton.templates.attention": {"sptc.codegen.triton.templates.language"},
    "sptc.codegen.triton.templates.selection": {"sptc.codegen.triton.templates.language"},
    "sptc.codegen.triton.tuning": {"sptc.codegen.triton.target", "sptc.device.cache"},
}
TRITON = {f"sptc.codegen.triton.{room}" for room in ("run", "templates", "tuning")}  # who may import it, at the top or later


def module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("sptc") else f"sptc.{name}"


MODULES = {module(path): path for path in SOURCES}


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES or not str(node.module).startswith("sptc") else str(node.module) for name in names)


def within(name: str, rooms: Iterable[str]) -> bool:
    return any(room == "*" or f"{name}.".startswith(f"{room}.") for room in rooms)


def own_rooms(name: str) -> list[str]:
    """The module itself, if the table has a line for it, and its folder."""
    folder = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    return [key for key in dict.fromkeys((folder, name)) if key in MAY]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    name = module(path)
    rooms = own_rooms(name)
    assert rooms, f"{path.parent} has no line in MAY"
    may = {rooms[0], ERRORS, *(entry for room in rooms for entry in MAY[room])}
    wrong = {other for other in imported(path) if within(other, ("sptc",)) and not within(other, may)}
    assert not wrong


def test_every_permission_is_used() -> None:
    used = {room: {name for path in SOURCES if room in own_rooms(module(path)) for name in imported(path)} for room in MAY}
    assert not [
        (room, entry) for room, entries in MAY.items() for entry in entries if not any(within(name, (entry,)) for name in used[room])
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_triton_and_fx_stay_in_their_rooms(path: Path) -> None:
    name, modules = module(path), set(imported(path))
    assert within(name, TRITON) or not [other for other in modules if within(other, ("triton",))]
    assert not within(name, ("sptc.codegen",)) or not [other for other in modules if within(other, ("torch.fx",))]
    assert not [other for other in modules if within(other, ("passes", "codegen"))], "import it as sptc.passes, sptc.codegen"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_room_is_small_and_says_what_it_holds(folder: Path) -> None:
    entries = [entry for entry in folder.iterdir() if entry.name not in {"__init__.py", "__pycache__"} and not entry.is_symlink()]
    assert len(entries) <= MOST
    says = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert len(says.split()) >= 5, "say what lives here, and what may not"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_no_module_hides_behind_a_public_name(folder: Path) -> None:
    """A name that a package defines or imports, other than the module itself, would make `package.module` mean two things."""
    bound = set()
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            package = module(folder / "__init__.py")
            bound |= {alias.asname or alias.name for alias in node.names if node.module != package}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
    assert not bound & {entry.stem for entry in folder.iterdir()}


def test_the_first_page_of_the_architecture_is_what_ls_shows() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.search(r"^## Rooms\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    assert rooms, "docs/architecture.md has no section Rooms"
    named = re.findall(r"^\| `([\w/]+)/` \|", rooms[1], re.MULTILINE)
    assert sorted(named) == sorted({folder.relative_to(ROOT).as_posix() for folder in FOLDERS} | {"bench", "tests"})
