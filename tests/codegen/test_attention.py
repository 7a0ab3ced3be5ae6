"""The sparse attention ops against the reference in fp64: lists, outputs, every gradient, every kind of mask."""

import math
import platform
import re
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import sptc.codegen.ops  # noqa: F401
from sptc.codegen.cpu import compiler, transform_source
from sptc.codegen.reference import attention as reference
from sptc.codegen.reference.block_lists import list_width
from tests.attention_cases import MASKS, heads, operands

ops = torch.ops.sptc


def codebooks(h_kv, d, subspaces=2, codewords=5):
    return torch.randn(h_kv, subspaces, codewords, d // subspaces, generator=torch.Generator().manual_seed(9))


SIZES = [  # b, h, h_kv, n, m, d, d_v, query_block, key_block
    (2, 2, 2, 37, 37, 8, 8, 8, 4),
    (1, 4, 2, 19, 45, 4, 6, 4, 8),
    (2, 3, 1, 23, 11, 8, 4, 16, 3),
    (1, 2, 2, 13, 13, 4, 4, 1, 1),
    (1, 2, 1, 9, 14, 6, 2, 64, 64),
]
CAP = "0.7*tanh(1.4285714285714286*u0)"  # which bends most scores of these tests
TRANSFORMS = ["u0", CAP, "8*sigmoid(u0/2)", "3*erf(u0/4) + u0/2", "tanh(sigmoid(u0) + exp(u0/9))"]


def as_mask(spec):
    return reference.Mask(*spec)


def select(q, k, books, spec, selector, density, query_block, key_block, own, statistics=False, scale=0.3):
    return ops.select_blocks(q, k, books, *spec, selector, density, scale, query_block, key_block, own, statistics)


def gradients(function, q, k, v, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves)
    return out.detach(), lse.detach(), dict(zip("qkv", torch.autograd.grad(out, leaves, grad), strict=True))


def assert_close(got, want, tolerance, name, least=1.0):
    """Within a share of the largest value, or of `least` where all are less."""
    error = (got.double() - want).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance * max(least, want.abs().max().item()), (name, error)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_selection_equals_reference(name, sizes):
    b, h, h_kv, n, m, d, _, query_block, key_block = sizes
    q, k, books = heads(b, h, n, d, torch.float32), heads(b, h_kv, m, d, torch.float32, 1), codebooks(h_kv, d)
    spec = operands(name, b, h, n, m)
    for selector in ("pq", "pooled"):
        for own in (False, True):
            statistics = selector == "pq"
            args = (selector, 0.3, 0.3, query_block, key_block, own, statistics)
            want = reference.select_blocks(q.double(), k.double(), books, as_mask(spec), *args)
            got = ops.select_blocks(q, k, books, *spec, *args)
            assert got[0].dtype == got[1].dtype == torch.int32 and got[0].shape[-1] == list_width(n, m, 0.3, query_block, key_block, own)
            assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0]), (selector, own)
            torch.testing.assert_close(got[2:], want[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_equals_reference(name, sizes):
    turn = MASKS.index(name) + SIZES.index(sizes)
    dropout_p = 0.4 if turn % 2 else 0.0  # either with every mask and every size
    b, h, h_kv, n, m, d, d_v, query_block, key_block = sizes
    q, k, v, grad = heads(b, h, n, d), heads(b, h_kv, m, d, seed=1), heads(b, h_kv, m, d_v, seed=2), heads(b, h, n, d_v, seed=3)
    spec = operands(name, b, h, n, m)
    ids, counts, *_ = select(q, k, None, spec, "pooled", 0.4, query_block, key_block, True)
    seed = torch.tensor(1234) if dropout_p else None
    rest = (seed, dropout_p, 0.3, query_block, key_block, CAP if turn % 3 else "u0", None)
    want = gradients(lambda *x: reference.sparse_attention(*x, ids, counts, as_mask(spec), *rest), q, k, v, grad)
    got = gradients(lambda *x: ops.sparse_attention(*x, ids, counts, *spec, *rest), q, k, v, grad)
    assert_close(got[0], want[0], 1e-12, "out")
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-12)
    for x, gradient in got[2].items():
        assert_close(gradient, want[2][x], 1e-12, x)
    assert got[1].is_contiguous() and all(x.transpose(1, 2).is_contiguous() for x in (got[0], *got[2].values()))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("dtype", "key_block", "bound"), [(torch.float32, 16, 5e-6), (torch.bfloat16, 16, 1e-2), (torch.bfloat16, 5, 1e-2)]
)
def test_attention_in_the_dtypes_of_models(name, dtype, key_block, bound):
    """Heads as wide as models have them, tiles of several chunks of queries, the exponential and transposes of floats, pairs of bf16."""
    b, h, h_kv, n, m, d, d_v, query_block = 1, 4, 2, 203, 231, 40, 32, 100
    shapes = (b, h, n, d), (b, h_kv, m, d), (b, h_kv, m, d_v), (b, h, n, d_v)
    q, k, v, grad = (heads(*shape, dtype, seed) for seed, shape in enumerate(shapes))
    spec = operands(name, b, h, n, m)
    ids, counts, *_ = select(q.double(), k.double(), None, spec, "pooled", 0.4, query_block, key_block, True)
    rest = (torch.tensor(5), 0.2, 0.3, query_block, key_block, TRANSFORMS[MASKS.index(name) % len(TRANSFORMS)], None)
    exact = [x.double() for x in (q, k, v, grad)]
    want = gradients(lambda *x: reference.sparse_attention(*x, ids, counts, as_mask(spec), *rest), *exact)
    got = gradients(lambda *x: ops.sparse_attention(*x, ids, counts, *spec, *rest), q, k, v, grad)
    assert_close(got[0].double(), want[0], bound / 2, "out", least=0.0)
    for x, gradient in got[2].items():
        assert_close(gradient.double(), want[2][x], bound, x, least=0.0)


def with_sink(attention, leaves, grad):
    """Outputs and every gradient of `attention` of q, k, v and a sink."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = attention(*leaves)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip("qkvs", torch.autograd.grad(out, leaves, grad), strict=True))}


@pytest.mark.parametrize("name", ["none", "causal", "padding", "per head", "nothing", "boolean", "bias", "all"])
@pytest.mark.parametrize("kind", ["fp64", "fp32", "kernels"])
def test_a_sink_is_one_more_term_of_the_softmax(name, kind, monkeypatch):
    if kind == "kernels":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    b, h, h_kv, n, m, d, d_v, query_block, key_block = 2, 4, 2, 21, 26, 16, 16, 16, 8
    shapes = (b, h, n, d), (b, h_kv, m, d), (b, h_kv, m, d_v), (b, h, n, 1), (b, h, n, d_v)
    *exact, grad = (heads(*shape, seed=seed) for seed, shape in enumerate(shapes))
    exact[3] = 2 * exact[3] + 1  # weighs more than most keys
    exact[3][:, 1::2] = -math.inf  # of every second head none at all, whether a row sees a key or nothing
    spec = operands(name, b, h, n, m)
    lists = [x.float() for x in exact[:2]]  # kernels choose in fp32
    ids, counts, *_ = select(*lists, None, spec, "pooled", 0.6, query_block, key_block, False)
    rest = (torch.tensor(5), 0.3 if name in ("causal", "all") else 0.0, 0.3, query_block, key_block, CAP if name == "bias" else "u0")
    want = with_sink(lambda q, k, v, s: reference.sparse_attention(q, k, v, ids, counts, as_mask(spec), *rest, s), exact, grad)
    given = [x if kind == "fp64" else x.float() for x in (*exact, grad)]
    got = with_sink(lambda q, k, v, s: ops.sparse_attention(q, k, v, ids, counts, *spec, *rest, s), given[:4], given[4])
    for part, truth in want.items():
        finite = truth.isfinite()
        assert torch.equal(got[part].isfinite(), finite)
        assert_close(got[part][finite].double(), truth[finite], 1e-12 if kind == "fp64" else 5e-6, part)


def test_a_sink_alone_may_need_a_gradient():
    q, k, v = (heads(1, 2, 13, 8, seed=seed) for seed in range(3))
    everything = ("True", [], [], None, None)
    ids, counts, *_ = select(q, k, None, everything, "pooled", 1.0, 8, 8, False)
    sink = torch.zeros(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    results = []
    for attend in (
        lambda s: ops.sparse_attention(q, k, v, ids, counts, *everything, None, 0.0, 0.3, 8, 8, "u0", s)[0],
        lambda s: torch.cat((0.3 * q @ k.mT, s), -1).softmax(-1)[..., :-1] @ v,
    ):
        out = attend(sink.expand(-1, -1, 13, -1))
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), sink)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["padding", "boolean row", "bias row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_hidden_key_holds_does_not_matter(name, dtype):
    b, h, n = 2, 2, 40
    q, k, v = (heads(b, h, n, 8, dtype, seed) for seed in range(3))
    spec = operands(name, b, h, n, n)
    hidden = ~as_mask(spec).allowed((b, h, n, n), q.device).any(2)  # [b, h, m]: from every query
    assert hidden.any()
    ids, counts, *_ = select(q, k, None, spec, "pooled", 1.0, 8, 8, False)
    for transform in ("u0", CAP):
        want = ops.sparse_attention(q, k, v, ids, counts, *spec, None, 0.0, 0.3, 8, 8, transform, None)[0]
        for value in (torch.inf, torch.nan):
            there = k.masked_fill(hidden.unsqueeze(-1), value)
            assert torch.equal(ops.sparse_attention(q, there, v, ids, counts, *spec, None, 0.0, 0.3, 8, 8, transform, None)[0], want)


@pytest.mark.parametrize("name", ["none", "causal", "window", "per head", "boolean", "bias"])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nan_that_is_kept_never_becomes_a_number(place, name, dtype):
    b, h, h_kv, n = 2, 4, 2, 61
    tensors = {x: heads(b, h if x == "q" else h_kv, n, 8, dtype, seed) for seed, x in enumerate("qkv")}
    tensors[place][0, :, 33] = torch.nan
    spec = operands(name, b, h, n, n)
    ids, counts, *_ = select(tensors["q"], tensors["k"], None, spec, "pooled", 0.3, 8, 4, True)
    kept = as_mask(spec).allowed((b, h, n, n), ids.device) & reference.listed(ids, counts, n, n, 8, 4).repeat_interleave(h // h_kv, 1)
    rows = (torch.arange(n) == 33) & kept[0].any(-1) if place == "q" else kept[0, :, :, 33]
    for transform in ("u0", CAP):
        out, _ = ops.sparse_attention(*tensors.values(), ids, counts, *spec, None, 0.0, 0.3, 8, 4, transform, None)
        assert rows.any() and out[0][rows].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e9])
def test_large_scores_in_fp32_round_as_in_fused_attention(size):
    """Equal keys share a weight that backward computes from the log-sum-exp, which is off by its own rounding."""
    q, k, v, grad = (heads(2, 2, 50, 8, torch.float32, seed) for seed in range(4))
    q, k = size**0.5 * q, size**0.5 * k.repeat_interleave(2, 2)[:, :, :50]
    spec = operands("causal", 2, 2, 50, 50)
    ids, counts, *_ = select(q, k, None, spec, "pooled", 1.0, 8, 4, True)
    fused = lambda *x: (F.scaled_dot_product_attention(*x, is_causal=True, scale=1.0), x[0])  # noqa: E731
    got = gradients(lambda *x: ops.sparse_attention(*x, ids, counts, *spec, None, 0.0, 1.0, 8, 4, "u0", None), q, k, v, grad)
    theirs, want = gradients(fused, q, k, v, grad), gradients(fused, *(x.double() for x in (q, k, v, grad)))
    assert_close(got[0].double(), want[0], 1e-5, "out")
    for name in "qkv":
        off, allowed = (float((x[2][name].double() - want[2][name]).abs().max()) for x in (got, theirs))
        assert off <= 4 * allowed, (name, off, allowed)
    if size == 1e2:
        assert_close(got[2]["v"].double(), want[2]["v"], 1e-4, "v")


def test_operands_of_wrong_shapes_are_errors():
    q, k, v = (heads(1, 2, 40, 8, torch.float32, seed) for seed in range(3))
    everything = ("True", [], [], None, None)
    ids, counts, *_ = select(q, k, None, everything, "pooled", 1.0, 8, 8, False)
    rest = (None, 0.0, 0.3, 8, 8, "u0", None)
    for wrong in (
        (q, k, v[:, :, :10], ids, counts, *everything, *rest),
        (q, k, v, ids.long(), counts, *everything, *rest),
        (q, k, v, ids, counts, *everything, None, 0.0, 0.3, 16, 8, "u0", None),
        (q, k, v, ids, counts, "True", [], [], torch.ones(40, 20, dtype=torch.bool), None, *rest),
        (q, k, v, ids, counts, *everything, None, 1.5, 0.3, 8, 8, "u0", None),
        (q, k, v, ids, counts, *everything, None, 0.5, 0.3, 8, 8, "u0", None),
        (q, k, v, ids, counts, *everything, None, 0.0, 0.3, 8, 8, "u0", q[0, :, :, :1]),
    ):
        with pytest.raises(ValueError, match=r"must be|needs"):
            ops.sparse_attention(*wrong)


@pytest.mark.parametrize(
    "text",
    [
        *("(t0[b, k] // 2) == (t0[b, q] // 2)", "t0[b, k] % 3 < 2", "((k - q) // 3) % 2 == 0", "(k - 20) % (0 - 3) >= 0 - 1"),
        *("(t0[b, k] * 7) < 300", "(t0[b, q] + 250) > (t0[b, k] * 6)"),  # beyond what uint8 holds
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("kind", ["cpu", "kernels"])
def test_predicates_compute_as_python_does(text, dtype, kind, monkeypatch):
    if kind == "kernels":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if dtype.is_floating_point and "t0" in text and re.search("//|%", text):
            pytest.skip("no mask that is read has a quotient of fractions")
    q, k, v = (heads(2, 1, 24, 16, torch.float32 if kind == "kernels" else torch.float64, seed) for seed in range(3))
    tensor = torch.arange(-10 if dtype.is_signed else 0, 38 if dtype.is_signed else 48).view(2, 24).to(dtype)
    spec = (text, [tensor / 4 if dtype.is_floating_point else tensor], [], None, None)
    ids, counts, *_ = select(q, k, None, ("True", [], [], None, None), "pooled", 1.0, 8, 8, False)
    rest = (None, 0.0, 0.3, 8, 8, "u0", None)
    want = reference.sparse_attention(*(x.double() for x in (q, k, v)), ids, counts, as_mask(spec), *rest)[0]
    assert_close(ops.sparse_attention(q, k, v, ids, counts, *spec, *rest)[0].double(), want, 1e-5 if kind == "kernels" else 1e-12, "out")


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "float32", "float32"), ("float32", "bfloat16", "float16"), ("float64", "float32", "bfloat16")]
)
def test_operands_of_several_dtypes(dtypes):
    """Each gradient has the dtype of its operand; arithmetic is fp32, or fp64 for queries in fp64."""
    q, k, v = (heads(2, 2, 37, 24, getattr(torch, dtype), seed) for seed, dtype in enumerate(dtypes))
    spec = "k <= q", [], [], None, None
    ids, counts, *_ = select(q, k, None, spec, "pooled", 0.5, 8, 8, True)
    rest = None, 0.0, 0.3, 8, 8, "u0", None
    grad = heads(2, 2, 37, 24, q.dtype, 3)
    out, _, got = gradients(lambda *x: ops.sparse_attention(*x, ids, counts, *spec, *rest), q, k, v, grad)
    wide = (x.double() for x in (q, k, v, grad))
    want, _, gradient = gradients(lambda *x: reference.sparse_attention(*x, ids, counts, as_mask(spec), *rest), *wide)
    assert_close(out, want, 8 * torch.finfo(q.dtype).eps, "out")
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert got[name].dtype == x.dtype
        assert_close(got[name], gradient[name], 8 * max(torch.finfo(t.dtype).eps for t in (q, x)), name)


@pytest.mark.parametrize("selector", ["pooled", "pq"])
@pytest.mark.parametrize(("d", "d_v", "odd"), [(32, 32, False), (32, 32, True), (20, 6, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_results_are_those_of_fp32_rounded(dtype, d, d_v, odd, selector):
    """The same keys are chosen. fp16 is copied and widened: the same bits. bf16 may be multiplied as it is, and is not copied whole."""
    start = int(odd)  # rows at odd addresses, an odd number of elements apart
    q, k = (heads(4, 3, 61, d + start, dtype, seed)[..., start:] for seed in range(2))
    v, grad = (heads(4, 3, 61, d_v + start, dtype, seed)[..., start:] for seed in (3, 4))
    v[0, 1, 5, 3], grad[1, 2, 40, 1] = torch.nan, torch.inf
    spec = "k <= q", [], [], None, None
    books = None if selector == "pooled" else codebooks(3, d)
    chosen = select(q, k, books, spec, selector, 0.5, 16, 16, True, selector == "pq")
    for mine, other in zip(chosen, select(q.float(), k.float(), books, spec, selector, 0.5, 16, 16, True, selector == "pq"), strict=True):
        assert torch.equal(mine, other)
    assert not odd or q.stride(2) % 2 == 1
    ids, counts, *_ = chosen
    rest = *spec, None, 0.0, 0.3, 16, 16, "u0"

    def run(q, k, v, grad, out=None):
        found, lse = ops.sparse_attention(q, k, v, ids, counts, *rest, None)
        read = found if out is None else out
        return found, lse, *ops.sparse_attention_backward(grad, q, k, v, read, lse, ids, counts, *rest, [True] * 3)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees what its own thread takes
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            out, lse, *grads = run(q, k, v, grad)
    finally:
        torch.set_num_threads(threads)
    taken = accumulate(event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    assert dtype == torch.float16 or max(taken) <= sum(x.nbytes for x in (out, lse, *grads)) + lse.nbytes
    wide_out, wide_lse, *wide = run(*(x.float() for x in (q, k, v, grad)), out=out.float())
    bound = 0 if dtype == torch.float16 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(lse, wide_lse, rtol=0, atol=1e-5 * (bound > 0))
    for narrow, other in zip((out, *grads), (wide_out, *wide), strict=True):
        assert narrow.isnan().any()
        largest = other[other.isfinite()].abs().max().item()
        torch.testing.assert_close(narrow, other.to(dtype), rtol=0, atol=bound * largest, equal_nan=True)


@pytest.fixture(params=["x86-64-v3", "x86-64-v4"])
def older_processor(request, monkeypatch):
    """Native code for processors whose vectors are shorter, and that multiply no bf16."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86-64")
    if request.param.endswith("v4") and "avx512" not in torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(compiler, "_processor_flag", lambda: f"-march={request.param}")
    for loaded in (compiler._native, transform_source.transform):
        loaded.cache_clear()
    yield
    for loaded in (compiler._native, transform_source.transform):
        loaded.cache_clear()


def test_an_older_processor_computes_the_same(older_processor):
    cap = "2 * tanh(u0 / 2)"
    spec = operands("causal padding", 2, 4, 37, 37)
    for dtype, bound in ((torch.bfloat16, 2), (torch.float32, 40), (torch.float64, 40)):
        q, k, v, grad = (heads(2, 4 if seed in (0, 3) else 2, 37, 20, dtype, seed) for seed in range(4))
        ids, counts, *_ = select(q, k, None, spec, "pooled", 0.5, 16, 8, True)
        rest = None, 0.0, 0.3, 16, 8, cap, None
        got = gradients(lambda *x: ops.sparse_attention(*x, ids, counts, *spec, *rest), q, k, v, grad)  # noqa: B023
        wide = (x.double() for x in (q, k, v, grad))
        want = gradients(lambda *x: reference.sparse_attention(*x, ids, counts, as_mask(spec), *rest), *wide)  # noqa: B023
        assert_close(got[0], want[0], bound * torch.finfo(dtype).eps, "out", least=0.0)
        for name, gradient in want[2].items():
            assert_close(got[2][name], gradient, bound * torch.finfo(dtype).eps, name, least=0.0)


@pytest.mark.parametrize("name", ["none", "causal", "causal padding", "boolean"])
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_full_lists_equal_dense_attention(name, sizes):
    b, h, h_kv, n, m, d, d_v, query_block, key_block = sizes
    q, k, v, grad = heads(b, h, n, d), heads(b, h_kv, m, d, seed=1), heads(b, h_kv, m, d_v, seed=2), heads(b, h, n, d_v, seed=3)
    spec = operands(name, b, h, n, m)
    allowed = as_mask(spec).allowed((b, h, n, m), q.device)
    grad = grad * allowed.any(-1, keepdim=True)  # rows without keys excepted
    ids, counts, *_ = select(q, k, codebooks(h_kv, d), spec, "pq", 1.0, query_block, key_block, False)
    dense = lambda *x: (F.scaled_dot_product_attention(*x, attn_mask=allowed, scale=0.3, enable_gqa=True), q)  # noqa: E731
    want = gradients(dense, q, k, v, grad)
    got = gradients(
        lambda *x: ops.sparse_attention(*x, ids, counts, *spec, None, 0.0, 0.3, query_block, key_block, "u0", None), q, k, v, grad
    )
    assert_close(got[0] * allowed.any(-1, keepdim=True), want[0].nan_to_num(0.0) * allowed.any(-1, keepdim=True), 1e-12, "out")
    for x, gradient in got[2].items():
        assert_close(gradient, want[2][x].nan_to_num(0.0), 1e-12, x)


def test_equally_near_codewords_go_to_the_first():
    q, k = heads(1, 2, 21, 4, torch.float32), heads(1, 2, 21, 4, torch.float32, 1)
    books = codebooks(2, 4)
    books[:, :, 3] = books[:, :, 1]  # words 1 and 3 are one
    args = (None, None, "pq", 0.3, 0.5, 4, 4, False, True)
    got = ops.select_blocks(q, k, books, "True", [], [], *args)
    want = reference.select_blocks(q.double(), k.double(), books, reference.Mask(), *args[2:])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got[3][:, :, 1].sum() > 0 and not got[3][:, :, 3].any()
