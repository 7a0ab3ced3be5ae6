"""The checks of `make gpu` tell right from wrong, and its tuning asks every table."""

from dataclasses import replace

import pytest
import torch

from bench.gpu.sizes import DRY
from bench.kernels import check, steps, tuning
from bench.kernels.cases import AttentionCase, attention_operands
from sptc.codegen.reference import attention as reference
from sptc.codegen.reference.block_lists import lists_from_scores, nearest_first, owned
from sptc.codegen.triton.tuning.tiling import asking

CPU = torch.device("cpu")
CAUSAL = AttentionCase("causal", 1, 1024, 2, 1, 64, "causal", query_block=32, key_block=16)
FREE = AttentionCase("free", 2, 257, 2, 1, 96, "none", density=0.25, query_block=16, key_block=16)


def selected(case, seed):
    """Operands in fp64 of bf16 values, the reference's lists, and those of a kernel that rounds the means of runs to bf16."""
    o = attention_operands(case, CPU, torch.bfloat16, seed)
    exact = check._attention_in(o, CPU, torch.float64)
    mask, sizes, n = reference.Mask(*exact.mask), (case.query_block, case.key_block), case.length
    wanted = reference.select_blocks(exact.q, exact.k, None, mask, "pooled", case.density, case.scale, *sizes, case.own, False)[:2]
    allowed, visible = reference.choosable(mask, (case.batch, case.heads, n, n), case.kv_heads, *sizes, CPU)
    means = reference.pooled_means(exact.q, case.query_block).bfloat16().float()
    scores = reference.pooled_scores(means, exact.k.float(), allowed, visible, case.scale, *sizes)
    must = owned(n, n, *sizes, CPU) if case.own else None
    return exact, wanted, lists_from_scores(scores, allowed, must, nearest_first(n, n, *sizes, CPU), wanted[0].shape[-1])


def error(case, exact, got, wanted):
    return check.check_lists(case, exact, torch.bfloat16, got, wanted).error


@pytest.mark.parametrize("case", [CAUSAL, FREE], ids=lambda case: case.name)
def test_swaps_that_rounding_explains_are_no_error(case):
    swapped = 0
    for seed in range(8):
        exact, wanted, got = selected(case, seed)
        assert error(case, exact, got, wanted) <= 1
        swapped += not torch.equal(got[0], wanted[0])
    assert swapped, "nothing was swapped, so nothing was tried"


@pytest.mark.parametrize("case", [CAUSAL, FREE], ids=lambda case: case.name)
def test_any_other_block_is_an_error(case):
    """One entry of one list, of the last tile, replaced by a block chosen at random among those that it may choose."""
    for seed in range(4):
        exact, (ids, counts), _ = selected(case, seed)
        generator = torch.Generator().manual_seed(seed)
        other = ids[0, 0, -1].tolist()
        free = sorted(set(range(-(-case.length // case.key_block))) - set(other))
        place = int(torch.randint(len(other) - (2 if case.own else 0), (), generator=generator))  # not an owned one
        other[place] = free[int(torch.randint(len(free), (), generator=generator))]
        wrong = ids.clone()
        wrong[0, 0, -1] = torch.tensor(sorted(other))
        assert error(case, exact, (wrong, counts), (ids, counts)) > 5


def test_a_list_without_its_own_block_with_a_forbidden_one_too_short_or_unordered_is_an_error():
    exact, (ids, counts), _ = selected(CAUSAL, 0)
    tile = 20
    width = int(counts[0, 0, tile])
    kept = ids[0, 0, tile, :width].tolist()
    outside = next(b for b in range(40) if b not in kept)
    changes = {"owned": [*kept[:-1], outside], "forbidden": [*kept[1:], 63], "repeated": [kept[0], *kept[:-1]]}
    for name, change in {**changes, "order": kept[::-1]}.items():
        wrong = ids.clone()
        wrong[0, 0, tile, :width] = torch.tensor(change if name == "order" else sorted(change))
        assert error(CAUSAL, exact, (wrong, counts), (ids, counts)) == float("inf")
    fewer = counts.clone()
    fewer[0, 0, tile] -= 1
    assert error(CAUSAL, exact, (ids, fewer), (ids, counts)) == float("inf")


def test_a_wrong_output_is_an_error(monkeypatch):
    case = replace(DRY.checks[0], selector="pq")
    assert all(c.passed for c in check.check(case, CPU, torch.float32))
    right = steps.attend

    def wrong(case, o, *lists):
        out, lse = right(case, o, *lists)
        return out + 1e-3 * o.v.sum(), lse

    monkeypatch.setattr(steps, "attend", wrong)
    failed = {c.tensor for c in check.check(case, CPU, torch.float32) if not c.passed}
    assert "v" in failed and "out" in failed and "q" not in failed
    assert not check.Check("", "", float("nan"), 1.0).passed


def test_wrong_products_are_an_error(monkeypatch):
    assert all(c.passed for c in check.check_products(CPU, torch.bfloat16))
    monkeypatch.setattr(check, "_MULTIPLE", 0.0)
    assert not any(c.passed for c in check.check_products(CPU, torch.bfloat16))


def test_tuning_asks_every_table_of_the_launchers(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with asking() as asked:
        tuning.step(DRY.attention[0], CPU, torch.float32)()
    templates = {question.table.template for question in asked}
    assert templates >= {"attention_forward", "attention_backward_q", "attention_backward_kv"}


def test_tuning_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.run("") == 2 and "torch sees none" in capsys.readouterr().err
