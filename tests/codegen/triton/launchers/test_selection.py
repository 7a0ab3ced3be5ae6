"""Selection kernels, interpreted, against the reference: lists, statistics, every kind of mask."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sptc.codegen.reference import attention as reference
from sptc.codegen.reference.block_lists import list_width, lists_from_scores
from sptc.codegen.triton.launchers import selection
from sptc.codegen.triton.launchers.mask import KernelMask
from sptc.codegen.triton.launchers.precision import full_precision, product_precision
from sptc.codegen.triton.run.launch import recorded
from sptc.codegen.triton.target import KNOWN, targeting
from sptc.codegen.triton.tuning.tiling import Tiling, using
from tests.codegen.test_attention import MASKS, SIZES, codebooks, heads, operands

CPU = torch.device("cpu")

SMALL = {  # so that tiny inputs need several programs, several steps of a loop, and partial ones
    "encode_histogram": Tiling.of(4, 1, ROWS=16),
    "code_statistics": Tiling.of(4, 1, ROWS=32),
    "visible_keys": Tiling.of(4, 1, KEYS=16),
    "allowed_pairs": Tiling.of(4, 1, ROWS=16, COLUMNS=8),
    "run_means": Tiling.of(4, 1, ROWS=16),
    "pooled_logsumexp": Tiling.of(4, 1, ROWS=16, COLUMNS=16),
    "pooled_scores": Tiling.of(4, 1, ROWS=16, COLUMNS=16),
}


@pytest.fixture(params=["default", "small"])
def tiles(request):
    with contextlib.ExitStack() as stack:
        for template, tiling in SMALL.items() if request.param == "small" else ():
            stack.enter_context(using(template, tiling))
        yield request.param


def inputs(sizes, dtype):
    b, h, h_kv, n, m, d, *_ = sizes
    return heads(b, h, n, d, dtype), heads(b, h_kv, m, d, dtype, 1), codebooks(h_kv, d)


def as_reference(q, k, books, spec, *args):
    return reference.select_blocks(q.double(), k.double(), books, reference.Mask(*spec), *args)


def interpreted(q, k, books, spec, *args):
    return selection.select_blocks(q, k, books, KernelMask(*spec, (*q.shape[:3], k.shape[2])), *args)


def assert_same_lists(got, want):
    assert got[0].dtype == got[1].dtype == torch.int32
    assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])


@pytest.mark.parametrize("name", MASKS)
def test_lists_equal_the_references(name, tiles):
    """Each mask with small tiles of one shape and the default ones of another; both selectors, both dtypes, with and without own blocks."""
    number = 2 * MASKS.index(name) + (tiles == "small")
    sizes = SIZES[number % len(SIZES)]
    b, h, _, n, m, _, _, query_block, key_block = sizes
    spec, own, dtype = operands(name, b, h, n, m), number % 3 != 0, (torch.float32, torch.float16)[number // 2 % 2]
    q, k, books = inputs(sizes, dtype)
    args = ("pq", 0.3, 0.3, query_block, key_block, own, True)
    got, want = interpreted(q, k, books, spec, *args), as_reference(q, k, books, spec, *args)
    assert_same_lists(got, want)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[3], want[3])
    q, k = q.float(), k.float()  # in fp16 the means of queries are rounded
    args = ("pooled", 0.3, 0.3, query_block, key_block, own, False)
    got = interpreted(q, k, None, spec, *args)
    assert_same_lists(got, as_reference(q, k, None, spec, *args))
    assert got[2].shape == got[3].shape == (0,)


@pytest.fixture
def pooled(monkeypatch):
    """Scores of all (tile, block) pairs by the kernels, and by the reference in fp64."""

    def scores(q, k, spec, query_block, key_block):
        args = ("pooled", 0.3, 0.3, query_block, key_block, False, False)
        with recorded(run=True) as launches:
            interpreted(q, k, None, spec, *args)
        with monkeypatch.context() as patch:
            seen = []
            patch.setattr(reference, "lists_from_scores", lambda scores, *rest: seen.append(scores) or lists_from_scores(scores, *rest))
            as_reference(q, k, None, spec, *args)
        return launches[-1].arguments["scores_ptr"].double(), seen[0]

    return scores


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize(
    "name, sizes",  # b, h, h_kv, n, m, d, query_block, key_block
    [
        ("per head", (2, 2, 2, 130, 59, 10, 48, 24)),  # 3 runs of 16; neither tiles nor blocks are powers of two
        ("causal", (1, 4, 2, 71, 71, 4, 34, 32)),  # 17 runs of 2: more than the rows of a program
        ("all", (2, 2, 1, 61, 70, 20, 13, 3)),  # one run of 13
        ("window", (1, 2, 1, 75, 75, 6, 2, 7)),  # programs that start after the first block and end before the last
        ("boolean row", (2, 2, 1, 19, 23, 4, 1, 1)),  # every query for itself
    ],
)
def test_pooled_scores_equal_the_references(name, sizes, dtype, tolerance, pooled):
    b, h, h_kv, n, m, d, query_block, key_block = sizes
    q, k, _ = inputs((b, h, h_kv, n, m, d), dtype)
    with contextlib.ExitStack() as stack:
        for template in ("run_means", "pooled_logsumexp", "pooled_scores"):
            stack.enter_context(using(template, SMALL[template]))
        got, want = pooled(3 * q, k, operands(name, b, h, n, m), query_block, key_block)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["causal padding", "boolean row"])
def test_what_is_not_finite_has_no_say_in_pooled_scores(name, value, pooled, tiles):
    """Neither hidden keys, nor runs whose mean or logits are not finite; other runs of their tiles count as ever."""
    b, h, n, query_block, key_block = 2, 2, 70, 32, 8
    q, k, _ = inputs((b, h, 1, n, n, 4), torch.float32)
    spec = operands(name, b, h, n, n)
    visible = reference.Mask(*spec).visible((b, h, n, n), q.device).any(1, keepdim=True)
    assert not visible.all()
    finite, _ = pooled(q, k, spec, query_block, key_block)
    hidden, want = pooled(q, k.masked_fill(~visible.unsqueeze(-1), value), spec, query_block, key_block)
    assert torch.equal(hidden, finite)
    torch.testing.assert_close(hidden, want, rtol=1e-5, atol=1e-6)

    q, k = q.clone(), k.clone()
    q[:, 0, 5, 1] = value  # the first of two runs of a tile
    k[:, 0, 33, 2] = value  # seen by some tiles, and not by all
    got, want = pooled(q, k, spec, query_block, key_block)
    assert got.isfinite().all() and got[:, :, 0].any() and not torch.equal(got, finite)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [False, True])
def test_lists_longer_than_a_chunk(own, monkeypatch):
    monkeypatch.setattr(selection, "_LONGEST_CHUNK", 8)
    sizes = b, h, _, n, m, _, _, _, _ = (1, 2, 1, 29, 45, 4, 4, 16, 1)
    q, k, books = inputs(sizes, torch.float32)
    for density in (0.2, 1.0):
        args = ("pq", density, 0.3, 16, 1, own, False)
        spec = operands("aligned", b, h, n, m)
        assert_same_lists(interpreted(q, k, books, spec, *args), as_reference(q, k, books, spec, *args))


def test_equal_scores_go_to_the_nearest_block():
    """One codeword for all: every allowed block scores alike, and the lists are windows around their tiles."""
    sizes = b, h, h_kv, n, m, _, _, query_block, key_block = (1, 2, 1, 40, 40, 4, 4, 4, 4)
    q, k, _ = inputs(sizes, torch.float32)
    args = ("pq", 0.3, 0.3, query_block, key_block, False, False)
    got = interpreted(q, k, torch.zeros(h_kv, 2, 5, 2), operands("none", b, h, n, m), *args)
    assert got[0][0, 0].tolist() == [[min(max(tile - 1, 0), 7) + i for i in range(3)] for tile in range(10)]
    assert_same_lists(got, as_reference(q, k, torch.zeros(h_kv, 2, 5, 2), operands("none", b, h, n, m), *args))


def test_equally_near_codewords_go_to_the_first():
    q, k, books = inputs((1, 2, 2, 21, 21, 4), torch.float32)
    books[:, :, 3] = books[:, :, 1]  # words 1 and 3 are one
    args = ("pq", 0.3, 0.5, 4, 4, False, True)
    got = interpreted(q, k, books, operands("none", 1, 2, 21, 21), *args)
    assert_same_lists(got, as_reference(q, k, books, operands("none", 1, 2, 21, 21), *args))
    assert got[3][:, :, 1].sum() > 0 and not got[3][:, :, 3].any()


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_launches_are_the_same_without_data(mode):
    sizes = b, h, h_kv, n, m, _, _, query_block, key_block = SIZES[1]
    spec = operands("all", b, h, n, m)

    def launches(q, k, books, predicate, tensors, *rest):
        with recorded() as found:
            result = interpreted(q, k, books, (predicate, tensors, *rest), "pq", 0.3, 0.3, query_block, key_block, True, True)
        assert result[0].shape == (b, h_kv, -(-n // query_block), list_width(n, m, 0.3, query_block, key_block, True))
        return [(launch.spec, launch.grid, {x: y for x, y in launch.arguments.items() if not torch.is_tensor(y)}) for launch in found]

    q, k, books = inputs(sizes, torch.float32)
    want = launches(q, k, books, *spec)
    assert [spec.template for spec, *_ in want] == [
        "visible_keys", "allowed_pairs", "encode_histogram", "encode_histogram", "code_statistics", "choose_blocks",
    ]  # fmt: skip
    fake = FakeTensorMode()
    as_empty = fake.from_tensor if mode == "fake" else lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    predicate, tensors, numbers, mask, bias = spec
    with fake if mode == "fake" else contextlib.nullcontext():
        assert want == launches(
            *map(as_empty, (q, k, books)), predicate, [*map(as_empty, tensors)], numbers, as_empty(mask), as_empty(bias)
        )


def test_refuses_double_precision():
    q, k, books = inputs(SIZES[0], torch.float64)
    with pytest.raises(TypeError, match=r"q is torch\.float64"):
        interpreted(q, k, books, operands("none", 2, 2, 37, 37), "pq", 0.3, 0.3, 8, 4, False, False)


def test_default_blocks_leave_a_choice_and_grow_with_length():
    for density in (0.125, 0.5):
        sizes = [selection.default_blocks(n, n, density, own=True) for n in (256, 1024, 4096, 32768)]
        assert sizes == sorted(sizes) and sizes[-1] == (128, 64)
        for n, (query_block, key_block) in zip((1024, 4096, 32768), sizes[1:], strict=True):
            assert query_block + 2 * key_block <= density * n
    assert selection.default_blocks(5, 3, 0.1) == (5, 3)


@pytest.mark.parametrize("switch", ["old", "new", None])
def test_product_precision_follows_torch(switch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if switch == "old":
            matmul.allow_tf32 = True
        elif switch == "new":
            matmul.fp32_precision = "tf32"
        # Without TF32 fp32 takes three products on matrix units, not multiply-adds; AMD has matrix units for fp32.
        for target, full in (("sm_80", "tf32x3"), ("sm_90", "tf32x3"), ("sm_100", "tf32x3"), ("gfx942", "ieee")):
            with targeting(KNOWN[target]):
                assert product_precision(torch.float32, CPU) == (full if switch is None else "tf32")
                assert product_precision(torch.bfloat16, CPU) == "tf32"
                assert full_precision(CPU) == full
    finally:
        matmul.fp32_precision = before
