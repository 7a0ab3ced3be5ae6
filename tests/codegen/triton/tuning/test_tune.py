"""Measured tile sizes: what is asked, timed, kept on disk and used again; with a clock of our own, for a device that need not be here."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
from triton.runtime.errors import OutOfResources

from sptc.codegen.triton.target import KNOWN
from sptc.codegen.triton.tuning import measured
from sptc.codegen.triton.tuning.tiling import Table, Tiling, TilingError, asking, using
from sptc.codegen.triton.tuning.tune import tune

BLOCK, SIZE = sympy.symbols("BLOCK size")
ROWS = tuple(Tiling.of(4, 2, BLOCK=block) for block in (32, 64, 128, 1024))
PRESENT = replace(KNOWN["sm_90"], device="NVIDIA H100 80GB HBM3")


def make_table(template="sample"):
    return Table(template, {"": ROWS}, shared_memory=BLOCK * SIZE * 4, registers=sympy.Integer(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.recall.cache_clear()
    yield tmp_path / "sptc" / "tiles"
    measured.recall.cache_clear()


def clock(times):
    """Takes `times` [BLOCK] for whatever runs; an exception is raised."""

    def milliseconds(run):
        time = times[run()]
        if isinstance(time, Exception):
            raise time
        return time

    return milliseconds


def block(table, target=PRESENT, size=64):
    return dict(table.choose(target, size=size).constants)["BLOCK"]


def test_default_is_the_first_that_fits():
    table = make_table()
    assert block(table) == 32 and block(table, KNOWN["sm_80"]) == 32
    assert [row.values()["BLOCK"] for row in table.fitting(PRESENT, size=64)] == [32, 64, 128]  # 1024 does not fit
    with pytest.raises(TilingError, match=r"'sample' fit sm_90 .* with size=100000"):
        block(table, size=100000)


def test_the_best_is_kept_and_used():
    table, other = make_table(), make_table("other")

    def run():
        block(other, KNOWN["sm_90"])  # only named: never measured
        return block(table)

    (choice,) = tune(run, clock({32: 3.0, 64: 1.0, 128: 2.0}))
    assert choice.best == ROWS[1] and dict(choice.milliseconds) == dict(zip(ROWS, (3.0, 1.0, 2.0), strict=False))
    assert block(table) == 64
    assert block(table, size=65) == 32  # other facts
    assert block(table, KNOWN["sm_90"]) == 32  # ahead of time
    assert block(table, replace(PRESENT, device="NVIDIA H200")) == 32
    assert block(other) == 32
    assert tune(run, clock({})) == []  # measured once


def test_one_question_at_a_time():
    """Two kernels, one template with two sets of facts: each is varied alone, with what was chosen before it."""
    table, other = make_table(), make_table("other")
    seen = []

    def run():
        seen.append((block(table), block(table, size=2), block(other)))
        return seen[-1]

    choices = tune(run, lambda r: float(sum(abs(x - y) for x, y in zip(r(), (64, 1024, 128), strict=True))))
    assert [c.best.values()["BLOCK"] for c in choices] == [64, 1024, 128]
    assert run() == (64, 1024, 128)
    assert seen[1:4] == [(32, 32, 32), (64, 32, 32), (128, 32, 32)] and seen[-2] == (64, 1024, 128)


def test_what_does_not_fit_after_all(caplog):
    table = make_table()
    too_large = OutOfResources(300000, 232448, "shared memory")
    (choice,) = tune(lambda: block(table), clock({32: too_large, 64: 2.0, 128: 3.0}))
    assert choice.best == ROWS[1]
    with pytest.raises(OutOfResources):
        tune(lambda: block(table, size=63), clock(dict.fromkeys((32, 64, 128), too_large)))
    with pytest.raises(RuntimeError, match="wrong result"):
        tune(lambda: block(table, size=62), clock(dict.fromkeys((32, 64, 128), RuntimeError("wrong result"))))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"tiling": 3}', '{"tiling": {"BLOCK": 999}}', "\x00\xff"], ids=repr)
def test_a_file_with_anything_else_is_measured_anew(cache, content):
    table = make_table()
    tune(lambda: block(table), clock({32: 3.0, 64: 1.0, 128: 2.0}))
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["device"] == PRESENT.device
    path.write_text(content)
    measured.recall.cache_clear()
    assert block(table) == 32
    assert len(tune(lambda: block(table), clock({32: 3.0, 64: 2.0, 128: 1.0}))) == 1
    assert block(table) == 128


def test_a_candidate_that_the_table_dropped_is_not_used():
    tune(lambda: block(make_table()), clock({32: 3.0, 64: 1.0, 128: 2.0}))
    shorter = Table("sample", {"": ROWS[2:]}, shared_memory=BLOCK * SIZE * 4, registers=sympy.Integer(0))
    assert block(shorter) == 128


def test_forcing_and_asking():
    table = make_table()
    with using("sample", ROWS[3]), asking() as asked:
        assert block(table) == block(table, size=65) == 1024
        with using("sample", ROWS[2], (("size", 65),)):
            assert (block(table), block(table, size=65)) == (1024, 128)
    assert block(table) == 32
    assert [dict(question.facts)["size"] for question in asked] == [64, 65, 64, 65]


WRITER = """
from sptc.codegen.triton.tuning import measured
for i in range(50):
    measured.remember("device", "sample", (("size", 1),), {"BLOCK": BLOCK}, {"x" * 2000: 1.0})
"""


def test_several_processes_write(cache):
    root = Path(__file__).parents[4]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER.replace("BLOCK}", f"{size}}}")], cwd=root) for size in (32, 64)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        measured.recall.cache_clear()
        values = measured.recall("device", "sample", (("size", 1),))
        seen.add(None if values is None else values["BLOCK"])
    assert all(writer.returncode == 0 for writer in writers)
    assert seen <= {None, 32, 64} and len(list(cache.iterdir())) == 1
