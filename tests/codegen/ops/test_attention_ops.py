"""How the sparse attention ops behave as torch ops: opcheck, fakes with symbolic sizes, autocast, compiled, and clear errors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sptc.codegen.ops  # noqa: F401
from sptc.codegen.cpu.attention import default_blocks
from sptc.codegen.reference.block_lists import list_width

ops = torch.ops.sptc


def case(dtype=torch.float32, b=2, h=4, h_kv=2, n=19, m=19, d=8):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, length, x, d, generator=generator).to(dtype).transpose(1, 2) for length, x in ((n, h), (m, h_kv), (m, h_kv)))
    books = torch.randn(h_kv, 2, 4, d // 2, generator=generator)
    padding = torch.arange(m) < torch.tensor([m, m - 5]).repeat(b)[:b, None]
    return q, k, v, books, padding


def attend(q, k, v, books, padding, seed=None, selector="pq", density=0.4, query_block=8, key_block=4):
    """The two ops as `rewrite` places them."""
    spec = ("(k <= q) & t0[b, k]", [padding], [], None, None)
    rest = (0.35, query_block, key_block)
    ids, counts, sums, code_counts = ops.select_blocks(q, k, books, *spec, selector, density, *rest, True, selector == "pq")
    out, lse = ops.sparse_attention(q, k, v, ids, counts, *spec, seed, 0.2 if seed is not None else 0.0, *rest, "2*tanh(0.5*u0)", None)
    return out, lse, ids, sums, code_counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    q, k, v, books, padding = case(dtype)
    spec = ("(k <= q) & t0[b, k] & (k > q - s0)", [padding], [9], torch.ones(19, 19, dtype=torch.bool), torch.zeros(1, 1, 1, 19))
    select = (q, k, books, *spec, "pq", 0.4, 0.35, 8, 4, True, True)
    torch.library.opcheck(ops.select_blocks.default, select)
    ids, counts, *_ = ops.select_blocks(*select)
    rest = (torch.tensor(3), 0.2, 0.35, 8, 4, "2*tanh(0.5*u0)")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.sparse_attention.default, (*leaves, ids, counts, *spec, *rest, None))
    sink = torch.randn(2, 4, 19, 1, requires_grad=True)
    torch.library.opcheck(ops.sparse_attention.default, (*leaves, ids, counts, *spec, *rest, sink))
    torch.library.opcheck(
        ops.sparse_attention.default, (*leaves, ids, counts, "k <= q", [], [], None, None, None, 0.0, 0.35, 8, 4, "u0", None)
    )
    out, lse = ops.sparse_attention(q, k, v, ids, counts, *spec, *rest, None)
    for need in ([True, True, True], [True, False, True], [False, False, False]):
        args = (torch.randn_like(out), q, k, v, out, lse, ids, counts, *spec, *rest, need)
        torch.library.opcheck(ops.sparse_attention_backward.default, args)
        assert [tuple(g.shape) for g in ops.sparse_attention_backward(*args)] == [
            tuple(x.shape) if wanted else (0,) for x, wanted in zip((q, k, v), need, strict=True)
        ]


def test_low_precision_is_as_close_as_dense():
    q, k, v, books, padding = case()
    exact = attend(*(x.double() for x in (q, k, v)), books, padding)[0]
    low = [x.bfloat16() for x in (q, k, v)]
    rounded = attend(*(x.double() for x in low), books, padding)
    got = attend(*low, books, padding)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32 and rounded[1].dtype == torch.float64
    assert torch.equal(got[2], rounded[2])
    assert (got[0].double() - rounded[0]).abs().max() <= 2.0**-8 * exact.abs().max()


def test_backward_in_16_bits_holds_no_operand_beside_the_gradients_that_it_returns():
    """It computes on copies in fp32: of q, k, v, out and its gradient, and of the three gradients, of which one more is being rounded."""
    q, k, v, books, padding = case(torch.bfloat16, h_kv=4, n=256, m=256, d=64)
    out, lse, ids, *_ = attend(q, k, v, books, padding, selector="pooled")
    counts = torch.full(ids.shape[:3], 1, dtype=torch.int32)
    rest = ("k <= q", [], [], None, None, None, 0.0, 0.35, 8, 4, "u0", [True, True, True])
    grad = torch.randn_like(out)

    def run():
        ops.sparse_attention_backward(grad, q, k, v, out, lse, ids, counts, *rest)

    run()  # compiles
    with torch.profiler.profile(profile_memory=True) as recorded:
        run()
    taken = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            taken += event.nbytes()
            most = max(most, taken)
    assert most < 8.2 * 4 * q.numel()


def test_autocast_casts_q_k_v_only():
    q, k, v, books, padding = case()
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse, ids, sums, _ = attend(q, k, v, books, padding)
    assert (out.dtype, lse.dtype, sums.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    low = attend(*(x.detach().bfloat16() for x in (q, k, v)), books, padding)
    assert torch.equal(out.detach(), low[0]) and torch.equal(ids, low[2])
    out.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    q, k, v, books, padding = case()
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (attend, torch.compile(attend, backend=backend, fullgraph=True)):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, lse, ids, sums, counts = function(*leaves, books, padding, torch.tensor(5))
        assert not sums.requires_grad and not lse.requires_grad
        results.append((out.detach(), lse, ids, sums, counts, *torch.autograd.grad(out, leaves, grad)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_one_symbolic_graph_serves_all_lengths():
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=graphs, dynamic=True, fullgraph=True)
    compiles = []
    for b, n, m in ((3, 19, 23), (5, 40, 50), (7, 33, 64)):  # no size equals another one by chance: torch would make one symbol of both
        q, k, v, books, _ = case(b=b, n=n, m=m)
        padding = torch.ones(b, m, dtype=torch.bool)
        for got, want in zip(compiled(q, k, v, books, padding), attend(q, k, v, books, padding), strict=True):
            torch.testing.assert_close(got, want)
        compiles.append(graphs.frame_count)
    assert compiles[0] == compiles[-1]


@pytest.mark.parametrize("density", [1 / 8, 0.3, 1 / 3, 0.7, 1.0])
def test_width_keeps_the_density_and_all_owned_blocks(density):
    for n, m, query_block, key_block in ((64, 64, 16, 8), (37, 53, 8, 12), (50, 20, 12, 8), (9, 100, 5, 7)):
        width = list_width(n, m, density, query_block, key_block, True)
        owned = [{(i + m - n) // key_block for i in range(t, min(t + query_block, n)) if i + m - n >= 0} for t in range(0, n, query_block)]
        kept = -(-round(density * m, 6) // 1)
        blocks = -(-m // key_block)
        assert max(map(len, owned)) <= width <= blocks
        assert list_width(n, m, density, query_block, key_block, False) == min(blocks, -(-kept // key_block))


def test_dropout_drops_and_keeps_the_mean():
    q, k, v, books, padding = case(n=64, m=64)
    v = torch.ones_like(v)
    outs = torch.stack([attend(q, k, v, books, padding, torch.tensor(seed))[0] for seed in range(40)])
    assert (outs[0] != 1.0).any() and not torch.equal(outs[0], outs[1])
    assert abs(outs.mean() - 1.0) < 0.01


def test_errors_are_clear():
    q, k, v, books, _ = case()
    spec = ("True", [], [], None, None)
    ids, counts, *_ = ops.select_blocks(q, k, books, *spec, "pq", 0.4, 0.35, 8, 4, True, False)
    bias = torch.zeros(19, 19, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient for bias"):
        ops.sparse_attention(q, k, v, ids, counts, "True", [], [], None, bias, None, 0.0, 0.35, 8, 4, "u0", None)
    with pytest.raises(ValueError, match="needs codebooks"):
        ops.select_blocks(q, k, None, *spec, "pq", 0.4, 0.35, 8, 4, True, False)
    with pytest.raises(ValueError, match="selector must be"):
        ops.select_blocks(q, k, books, *spec, "best", 0.4, 0.35, 8, 4, True, False)
    with pytest.raises(ValueError, match="density must be in"):
        ops.select_blocks(q, k, books, *spec, "pq", 0.0, 0.35, 8, 4, True, False)
    with pytest.raises(ValueError, match="multiple of h_kv"):
        ops.select_blocks(q[:, :3], k, books, *spec, "pq", 0.4, 0.35, 8, 4, True, False)
    with pytest.raises(ValueError, match="no codebooks"):
        ops.select_blocks(q, k, None, *spec, "pooled", 0.4, 0.35, 8, 4, True, True)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = ops.sparse_attention(*leaves, ids, counts, *spec, None, 0.0, 0.35, 8, 4, "u0", None)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_default_blocks_leave_a_choice_and_grow_with_length():
    for density in (1 / 16, 1 / 8, 1 / 4):
        sizes = [default_blocks(n, n, density, own=True) for n in (512, 1024, 2048, 4096, 8192)]
        assert sizes == sorted(sizes)
        for n, (query_block, key_block) in zip((512, 1024, 2048, 4096, 8192), sizes, strict=True):
            assert 2 * query_block <= max(density * n, 32) and key_block <= query_block
    assert default_blocks(512, 512, 1 / 8, own=True) == (32, 16)
    assert default_blocks(5, 3, 0.1) == (5, 3)


@pytest.mark.parametrize(
    "predicate", ["t0[(19 * b) + k] != 0", "t0[(19 * b) + ((k + 1) % 19)] != 0", "(t0[(19 * b) + q] != 0) & (t0[(19 * b) + k] != 0)"]
)
@pytest.mark.parametrize("where", ["first", "last"])
def test_mask_of_all_sequences_in_one_row(predicate, where):
    """Bounds of its elements are those of all sequences; blocks are allowed by each sequence's own."""
    q, k, v, *_ = (x.double() for x in case(b=3))
    rows = (torch.arange(19) < torch.tensor([[4], [11], [19]])).flip(0 if where == "last" else ()).flatten()
    spec = (predicate, [rows.long()], [], None, None)
    b, i, j = torch.arange(3).view(-1, 1, 1, 1), torch.arange(19).view(-1, 1), torch.arange(19)
    shown = rows[19 * b + ((j + 1) % 19 if "%" in predicate else j)]
    shown = (shown & rows[19 * b + i]) if "q" in predicate else shown
    want = (q @ k.repeat_interleave(2, 1).mT * 0.35).masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num() @ v.repeat_interleave(2, 1)
    ids, counts, *_ = ops.select_blocks(q, k, None, *spec, "pooled", 1.0, 0.35, 4, 4, False, False)
    torch.testing.assert_close(ops.sparse_attention(q, k, v, ids, counts, *spec, None, 0.0, 0.35, 4, 4, "u0", None)[0], want)
