"""On a GPU: every kernel in bf16, fp16 and fp32 against the reference in fp64, and measured tile sizes. Skipped without one."""

import pytest
import torch
from triton import knobs

from bench.kernels import check, tuning
from bench.kernels.cases import AttentionCase
from bench.kernels.clock import alternating, milliseconds
from sptc.codegen.triton.run import load, precompile
from sptc.codegen.triton.target import target_of
from sptc.device import measure

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = AttentionCase("attention", 2, 257, 4, 2, 64, "causal", density=0.25, query_block=64, key_block=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", check.CASES, ids=lambda case: case.name)
def test_kernels_against_the_reference(case, dtype):
    checks = check.check(case, torch.device("cuda"), dtype)
    assert len(checks) > 4
    assert not [c for c in checks if not c.passed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_blocks_against_the_definition(dtype):
    assert not [c for c in check.check_products(torch.device("cuda"), dtype) if not c.passed]


def test_same_bits_every_time():
    run = tuning.step(SMALL, torch.device("cuda"), torch.bfloat16)
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_first_launches_find_their_kernels_compiled(tmp_path, monkeypatch):
    """What is told from shapes alone is what Triton asks its cache for."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(load, "_loaded", {})  # kernels that this process has launched already know their code
    monkeypatch.setattr(precompile, "_compiled", set())
    device, hits = torch.device("cuda"), []
    with torch.no_grad():
        precompile.precompile(measure.launches(device), target_of(device))
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        measure.measure(device)
    assert len(hits) > 20 and all(hits)


def test_tile_sizes_are_measured(tmp_path, monkeypatch):
    from sptc.codegen.triton.tuning import measured
    from sptc.codegen.triton.tuning.tune import tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.recall.cache_clear()
    device = torch.device("cuda")
    run = tuning.step(SMALL, device, torch.bfloat16)
    choices = tune(run, lambda call: milliseconds(call, device, rounds=2))
    assert choices and len(list((tmp_path / "sptc" / "tiles").iterdir())) == len(choices)
    assert tune(run, lambda call: 1 / 0) == []
    measured.recall.cache_clear()


def test_clock_sees_the_device():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    times = alternating({"short": lambda: a[:512] @ a, "long": lambda: a @ a}, 3, device)
    assert times["long"].ms > 3 * times["short"].ms > 0
    assert times["long"].peak_mib == pytest.approx(64, rel=0.2)
