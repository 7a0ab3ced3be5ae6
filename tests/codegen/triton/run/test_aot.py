"""Kernels compiled ahead of time: every template for every architecture, and what must hold of the result.

`python -m bench.kernels --aot` compiles all model families at both head sizes; here each target gets one family, so that together they
cover all, and of the templates that its family does not launch the first that any does.
"""

from dataclasses import replace

import pytest
import torch
from triton.backends.compiler import GPUTarget

from bench.kernels import __main__ as command
from bench.kernels import ahead, cases, check
from sptc.codegen.triton.run import aot
from sptc.codegen.triton.run.aot import Resources
from sptc.codegen.triton.run.launch import Launch
from sptc.codegen.triton.run.load import load
from sptc.codegen.triton.target import KNOWN

FAMILY = {"sm_80": "OPT-like", "sm_90": "LLaMA-like", "sm_100": "GPT-2-like", "gfx942": "BERT-like"}
HEAD = {"sm_80": "d128", "sm_90": "d64", "sm_100": "d128", "gfx942": "d64"}


def chosen(target):
    """One launch of each template."""
    order = cases.ATTENTION
    first = [case for case in order if case.name in (FAMILY[target], f"{FAMILY[target]} {HEAD[target]}")]
    assert len(first) == 1
    found = {}
    for case in (*first, *order):
        for launch in ahead.launches(case, KNOWN[target]):
            found.setdefault(launch.spec.template, (launch, case.name))
    return found


@pytest.mark.parametrize("target", KNOWN)
def test_every_template_compiles_within_bounds(target):
    found = chosen(target)
    assert found.keys() == ahead.templates()
    rows = [ahead.row(launch, case, KNOWN[target]) for launch, case in found.values()]
    assert not [row for row in rows if row.broken]
    products = {name for name, (launch, _) in found.items() if "tl.dot(" in load(launch.spec).source}
    assert products >= {"attention_forward", "attention_backward_q", "attention_backward_kv"}
    assert {row.template for row in rows if row.used.matrix_instructions} == products
    assert all(0 < row.used.registers <= KNOWN[target].registers for row in rows)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_fp32_runs_on_matrix_units_without_tf32(target):
    """Three TF32 products of split operands, which must fit; multiply-adds would take about ten times as long. Some registers spill."""
    (wide,) = cases.named(cases.ATTENTION, "LLaMA-like d128")  # what needs most room
    kernels = [
        launch
        for launch in ahead.launches(wide, KNOWN[target], torch.float32)
        if launch.spec.template in ("attention_forward", "attention_backward_q", "attention_backward_kv")
    ]
    assert len(kernels) == 3 and {dict(launch.spec.constants)["PRECISION"] for launch in kernels} == {"tf32x3"}
    rows = [ahead.row(launch, "fp32", KNOWN[target]) for launch in kernels]
    # Operands are split in registers, where no warpgroup's product takes both: these are of one warp.
    assert not [row for row in rows if any("spills" not in bound and "mma.sync" not in bound for bound in row.broken)]


def test_sizes_of_one_compile():
    """Triton turns an integer argument of 1 into a constant, which has no methods; the interpreter does not."""
    first = {}
    for case in check.CASES:
        for launch in ahead.launches(case, KNOWN["sm_90"]):
            first.setdefault(launch.spec.template, launch)
    assert first.keys() == ahead.templates()
    for launch in first.values():
        ones = {name: 1 if isinstance(value, int) else value for name, value in launch.arguments.items()}
        aot.compile_ahead(replace(launch, arguments=ones), KNOWN["sm_90"])


def a_launch(template="attention_forward", target="sm_90"):
    (found,) = (x for x in ahead.launches(cases.ATTENTION[0], KNOWN[target]) if x.spec.template == template)
    return found


@pytest.mark.parametrize(
    "used, broken",
    [
        (Resources(128, 0, 227 * 1024, 8, 8), ()),
        (Resources(255, 8, 0, 8, 8), ("spills 8 bytes",)),
        (Resources(255, 0, 227 * 1024 + 1, 8, 8), ("232449 bytes of shared memory, 232448 are there",)),
        (Resources(255, 4, 0, 0, 0), ("spills 4 bytes", "no matrix instruction")),
        (Resources(128, 0, 0, 8, 6), ("2 of 8 matrix instructions are mma.sync, those of one warp",)),
    ],
)
def test_bounds(used, broken):
    assert ahead.broken_bounds(a_launch(), used, KNOWN["sm_90"]) == broken


def test_mma_sync_is_what_an_ampere_gpu_has():
    assert ahead.broken_bounds(a_launch(target="sm_80"), Resources(128, 0, 0, 8, 0), KNOWN["sm_80"]) == ()
    assert [replace(KNOWN["sm_90"], arch=arch).warpgroups for arch in (86, 90, 100, 103, 120)] == [False, True, True, True, False]


def test_a_kernel_without_products_needs_no_matrix_instruction():
    assert ahead.broken_bounds(a_launch("choose_blocks"), Resources(20, 0, 0, 0, 0), KNOWN["sm_90"]) == ()


def test_table_and_exit_code(monkeypatch, capsys):
    row = ahead.Row("sample", "LLaMA-like", "sm_90", Resources(32, 0, 1024, 8, 8), ())
    broken = ahead.Row("other", "LLaMA-like", "sm_90", None, ("does not compile: CompilationError here",))
    for rows, code in (((row,), 0), ((row, broken), 1)):
        monkeypatch.setattr(ahead, "compiled", lambda *_, rows=rows: iter(rows))
        assert command.compile_all(["sm_90"], "") == code
    assert "2 kernels, 1 with a broken bound" in (out := capsys.readouterr().out) and "does not compile" in out


def test_a_kernel_that_does_not_compile_is_a_row():
    launch = a_launch()
    bad = {**launch.arguments, "q_ptr": 3}  # a number where the kernel loads from a pointer
    row = ahead.row(Launch(launch.spec, launch.grid, bad), "sample", KNOWN["sm_90"])
    assert row.used is None and row.broken[0].startswith("does not compile: CompilationError")


def test_specialised_as_when_run():
    """On "meta" as on a device: integers equal to 1 become constants, alignment is known, and offsets into a storage count."""
    launch = a_launch("choose_blocks")
    kernel = load(launch.spec)
    for target, range_known in (("sm_90", []), ("gfx942", [["tt.pointer_range", 32]])):
        known = KNOWN[target]
        pointer, *numbers = kernel.parameters
        for value, attributes in (
            (torch.empty(8, dtype=torch.bfloat16, device="meta"), [["tt.divisibility", 16], *range_known]),
            (torch.empty(8, dtype=torch.bfloat16, device="meta")[1:], range_known),
        ):
            arguments = {**launch.arguments, pointer: value, **dict(zip(numbers, (1, 48, 3, 2**31), strict=False))}
            source, options = aot._source(kernel, arguments, GPUTarget(known.backend, known.arch, known.warp_size))
            assert source.signature[pointer] == "*bf16" and source.attrs[(0,)] == attributes
            assert [source.signature[name] for name in numbers[:4]] == ["constexpr", "i32", "i32", "i64"]
            assert source.constants[(1,)] == 1 and source.attrs[(2,)] == source.attrs[(4,)] == [["tt.divisibility", 16]]
            assert not source.attrs[(3,)] and options["num_warps"] == launch.spec.num_warps


def tiled(launch, num_warps, **constants):
    constants = {**dict(launch.spec.constants), **constants}
    return replace(launch, spec=replace(launch.spec, constants=tuple(sorted(constants.items())), num_warps=num_warps))


def test_spilling_is_seen():
    """A tile far too large for its warps, compiled for real."""
    row = ahead.row(tiled(a_launch(target="sm_80"), 2, BLOCK_M=256), "sample", KNOWN["sm_80"])
    assert row.broken and row.broken[0].startswith("spills")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("warps, rows", [(4, 32), (2, 64)], ids=["too few rows", "too few warps"])
def test_a_product_of_single_warps_is_seen(target, warps, rows):
    """A tile that no warpgroup multiplies, compiled for real: it has matrix instructions, but not the fast ones."""
    row = ahead.row(tiled(a_launch(target=target), warps, BLOCK_M=rows), "sample", KNOWN[target])
    assert row.used.matrix_instructions and any("mma.sync" in bound for bound in row.broken)
