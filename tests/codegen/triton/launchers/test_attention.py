"""The attention kernels, interpreted, against the reference in fp64: outputs, every gradient, every kind of mask, lists of any content."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sptc.codegen.reference import attention as reference
from sptc.codegen.reference.block_lists import block_count, list_width
from sptc.codegen.triton.launchers import attention
from sptc.codegen.triton.launchers.inverted import inverted_lists
from sptc.codegen.triton.run.aot import compile_ahead, resources
from sptc.codegen.triton.run.launch import recorded
from sptc.codegen.triton.run.load import load
from sptc.codegen.triton.target import KNOWN, targeting
from sptc.codegen.triton.tuning.tiling import Tiling, using
from tests.attention_cases import MASKS, heads, operands

SCALE = 0.3
SIZES = {  # b, h, h_kv, n, m, d, d_v, query_block, key_block; BLOCK_M, BLOCK_N
    "gathered keys": ((2, 2, 2, 37, 37, 24, 24, 16, 8), (16, 32)),
    "gathered rows": ((1, 4, 2, 19, 45, 16, 32, 5, 3), (16, 16)),
    "parts of blocks": ((1, 4, 1, 40, 40, 8, 16, 16, 32), (16, 16)),
    "one by one": ((1, 2, 2, 13, 13, 80, 16, 1, 1), (16, 16)),
    "larger tiles": ((2, 2, 1, 33, 50, 16, 16, 32, 16), (32, 16)),
    "heads in a tile": ((1, 4, 2, 24, 33, 16, 16, 8, 16), (16, 16)),
    "even": ((1, 2, 2, 32, 48, 16, 32, 16, 16), (16, 16)),
    "odd parts": ((1, 2, 1, 35, 35, 16, 16, 20, 24), (16, 16)),
}


@contextlib.contextmanager
def tiles(block_m: int, block_n: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for template in ("attention_forward", "attention_backward_q", "attention_backward_kv"):
            stack.enter_context(using(template, Tiling.of(4, 1, BLOCK_M=block_m, BLOCK_N=block_n)))
        yield


def some_lists(b: int, h_kv: int, n: int, m: int, query_block: int, key_block: int) -> tuple[Tensor, Tensor]:
    """Random lists, some empty, some full; what does not count is no block at all."""
    generator = torch.Generator().manual_seed(7)
    shape, blocks = (b, h_kv, block_count(n, query_block)), block_count(m, key_block)
    counts = torch.randint(-1, blocks + 2, shape, generator=generator).clamp(0, blocks)
    ids = torch.rand(*shape, blocks, generator=generator).argsort(-1)
    listed = torch.arange(blocks) < counts.unsqueeze(-1)
    ids = ids.masked_fill(~listed, torch.iinfo(torch.int32).max).sort(-1).values
    return ids.to(torch.int32), counts.to(torch.int32)


def gradients(function, inputs, grad_out):
    """out, lse and the gradients of `function` by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    grads = torch.autograd.grad(out, leaves, grad_out)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))}


def by_kernels(inputs, grad_out, ids, counts, spec, *rest):
    out, lse = attention.forward(*inputs, ids, counts, *spec, *rest)
    grads = attention.backward(grad_out, *inputs, out, lse, ids, counts, *spec, *rest, [True, True, True])
    return {"out": out, "lse": lse, **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    """No further from the truth than a small multiple of the error of the same formula in plain torch, in the same dtype."""
    for name, truth in want.items():
        finite = truth.isfinite()
        assert torch.equal(got[name].isfinite(), finite) and torch.equal(got[name][~finite].double(), truth[~finite]), name
        scale = truth[finite].abs().max().item() if finite.any() else 0.0
        error, allowed = ((x[name].double() - truth)[finite].abs().max().item() if finite.any() else 0.0 for x in (got, dense))
        eps = torch.finfo(got["out"].dtype).eps
        assert error <= 3.0 * allowed + 2.0 * eps * scale, (name, error, allowed, scale)


def check(name, sizes, dtype, dropout_p, transform="u0"):
    (b, h, h_kv, n, m, d, d_v, query_block, key_block), blocks = SIZES[sizes]
    lengths = ((h, n, d), (h_kv, m, d), (h_kv, m, d_v), (h, n, d_v))
    *inputs, grad_out = (heads(b, *shape, dtype, seed) for seed, shape in enumerate(lengths))
    spec = operands(name, b, h, n, m)
    ids, counts = some_lists(b, h_kv, n, m, query_block, key_block)
    ids_there = ids.clamp(max=block_count(m, key_block) - 1)  # the reference looks at all of a list
    rest = (torch.tensor(1234) if dropout_p else None, dropout_p, SCALE, query_block, key_block, transform)
    plain = lambda *x: reference.sparse_attention(*x, ids_there, counts, reference.Mask(*spec), *rest)  # noqa: E731
    with tiles(*blocks):
        got = by_kernels(inputs, grad_out, ids, counts, spec, *rest)
    assert got["out"].dtype == got["grad_q"].dtype == dtype and got["lse"].dtype == torch.float32
    assert all((x if x.dim() == 3 else x.transpose(1, 2)).is_contiguous() for x in got.values())
    assert_close(got, gradients(plain, [x.double() for x in inputs], grad_out.double()), gradients(plain, inputs, grad_out))


@pytest.mark.parametrize(("name", "sizes"), [(name, list(SIZES)[(2 * i + j) % len(SIZES)]) for i, name in enumerate(MASKS) for j in (0, 3)])
def test_attention_equals_reference(name: str, sizes: str) -> None:
    turn = MASKS.index(name) + list(SIZES).index(sizes)
    check(name, sizes, (torch.float32, torch.float16)[turn % 2], 0.3 if turn % 3 == 0 else 0.0)


@pytest.mark.parametrize("sizes", SIZES)
def test_every_size_with_and_without_a_mask(sizes: str) -> None:
    turn = list(SIZES).index(sizes)
    check("none", sizes, (torch.float32, torch.float16)[turn % 2], 0.0)
    check("causal", sizes, (torch.float16, torch.float32)[turn % 2], 0.0)


@pytest.mark.parametrize(
    ("sizes", "name", "transform"),
    [
        ("gathered keys", "causal", "0.7*tanh(1.4285714285714286*u0)"),
        ("larger tiles", "all", "0.7*tanh(1.4285714285714286*u0)"),
        ("even", "none", "50*tanh(0.02*u0)"),
        ("gathered rows", "window", "8*sigmoid(u0/2)"),
        ("odd parts", "bias", "3*erf(u0/4) + exp(u0/9)"),
    ],
)
def test_functions_of_scores(sizes: str, name: str, transform: str) -> None:
    check(name, sizes, torch.float16 if name == "all" else torch.float32, 0.3 if name == "window" else 0.0, transform)


@pytest.mark.parametrize("sizes", ["even", "parts of blocks", "larger tiles"])
def test_dropout_drops_what_the_reference_drops(sizes: str) -> None:
    """In the first two, four keys share the words of one counter."""
    check("window", sizes, torch.float32, 0.3)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("name", ["none", "causal padding", "boolean", "bias"])
def test_nan_that_is_kept_never_becomes_a_number(name: str, place: int) -> None:
    (b, h, h_kv, n, m, d, d_v, query_block, key_block), blocks = SIZES["larger tiles"]
    inputs = [heads(b, *shape, torch.float32, seed) for seed, shape in enumerate(((h, n, d), (h_kv, m, d), (h_kv, m, d_v)))]
    inputs[place][0, :, 2] = torch.nan
    spec = operands(name, b, h, n, m)
    ids, counts = some_lists(b, h_kv, n, m, query_block, key_block)
    listed = reference.listed(ids.clamp(max=block_count(m, key_block) - 1), counts, n, m, query_block, key_block)
    kept = reference.Mask(*spec).allowed((b, h, n, m), ids.device) & listed.repeat_interleave(h // h_kv, 1)
    rows = (torch.arange(n) == 2) & kept[0].any(-1) if place == 0 else kept[0, :, :, 2]
    with tiles(*blocks):
        out, _ = attention.forward(*inputs, ids, counts, *spec, None, 0.0, SCALE, query_block, key_block, "u0")
    assert rows.any() and out[0][rows].isnan().all() and out[1].isfinite().all()


def test_full_lists_equal_dense_attention() -> None:
    b, h, h_kv, n, d, query_block, key_block = 1, 4, 2, 37, 16, 16, 16
    q, k, v, grad_out = (heads(b, x, n, d, torch.float32, seed) for seed, x in enumerate((h, h_kv, h_kv, h)))
    width = list_width(n, n, 1.0, query_block, key_block, False)
    ids = torch.arange(width, dtype=torch.int32).expand(b, h_kv, block_count(n, query_block), -1)
    counts = torch.full(ids.shape[:3], width, dtype=torch.int32)
    with tiles(16, 16):
        got = by_kernels((q, k, v), grad_out, ids, counts, ("k <= q", [], [], None, None), None, 0.0, 0.25, query_block, key_block, "u0")
    dense = lambda *x: (F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), got["lse"])  # noqa: E731
    want, low = (gradients(dense, [x.to(dtype) for x in (q, k, v)], grad_out.to(dtype)) for dtype in (torch.float64, torch.float32))
    assert_close(got, want, low)


def test_any_strides_and_only_what_is_needed() -> None:
    """Inputs whose features do not follow each other, a gradient that is one number expanded, a subset of the gradients."""
    sizes, blocks = (1, 2, 2, 21, 21, 16, 16), (16, 8)
    b, h, _, n, _, d, _ = sizes
    inputs = [heads(b, h, n, d, torch.float32, seed) for seed in range(3)]
    strided = [x.mT.contiguous().mT for x in inputs]
    grad_out = torch.full((1, 1, 1, 1), 0.5).expand(b, h, n, d)
    ids, counts = some_lists(b, h, n, n, *blocks)
    spec, rest = operands("causal", b, h, n, n), (None, 0.0, -SCALE, *blocks, "u0")  # a scale below zero turns the maximum around
    with tiles(16, 16):
        want = by_kernels(inputs, grad_out.contiguous(), ids, counts, spec, *rest)
        got = by_kernels(strided, grad_out, ids, counts, spec, *rest)
        for name, x in want.items():
            assert torch.equal(got[name], x), name
        for need in ([True, False, False], [False, True, False], [False, False, True], [False, False, False]):
            grads = attention.backward(grad_out, *inputs, got["out"], got["lse"], ids, counts, *spec, *rest, need)
            for needed, grad, name in zip(need, grads, ("grad_q", "grad_k", "grad_v"), strict=True):
                assert torch.equal(grad, want[name]) if needed else grad.shape == (0,), (need, name)
    truth = reference.sparse_attention(*(x.double() for x in inputs), ids.clamp(max=2), counts, reference.Mask(*spec), *rest)[0]
    assert (got["out"] - truth).abs().max() < 1e-5


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(n: int, m: int) -> None:
    q, k, v = torch.ones(1, 2, n, 16), torch.ones(1, 2, m, 16), torch.ones(1, 2, m, 16)
    ids = torch.zeros(1, 2, block_count(n, 4), block_count(m, 4), dtype=torch.int32)
    got = by_kernels(
        (q, k, v), torch.ones(1, 2, n, 16), ids, ids.sum(-1, dtype=torch.int32), ("True", [], [], None, None), None, 0.0, 1.0, 4, 4, "u0"
    )
    assert not any(got[name].any() for name in ("out", "grad_q", "grad_k", "grad_v")) and bool((got["lse"] == -torch.inf).all())


def test_inverted_lists() -> None:
    ids, counts = some_lists(2, 3, 45, 70, 5, 8)
    tiles_of, offsets = inverted_lists(ids, counts, 9)
    assert tiles_of.dtype == offsets.dtype == torch.int32 and tiles_of.shape == (2, 3, ids[0, 0].numel()) and offsets.shape == (2, 3, 10)
    for b, h, block in itertools.product(range(2), range(3), range(9)):
        keep = [t for t in range(ids.shape[2]) if block in ids[b, h, t, : counts[b, h, t]]]
        assert tiles_of[b, h, offsets[b, h, block] : offsets[b, h, block + 1]].tolist() == keep


def test_inverting_long_lists_sorts_nothing() -> None:
    """Of few rows with many entries each, a sort takes several passes over all of them on a GPU, and no list needs one."""
    called: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    n, query_block, key_block = 32768, 128, 64
    tiles, blocks = n // query_block, n // key_block
    ids = torch.empty(1, 8, tiles, blocks // 8, dtype=torch.int32, device="meta")
    with Recorder():
        inverted, offsets = inverted_lists(ids, torch.empty(1, 8, tiles, dtype=torch.int32, device="meta"), blocks)
    assert inverted.shape == (1, 8, tiles * blocks // 8) and offsets.shape == (1, 8, blocks + 1)
    assert called and not [name for name in called if "sort" in name and "searchsorted" not in name]


@pytest.mark.parametrize("name", ["none", "all"])
def test_launches_need_no_values(name: str) -> None:
    """On fake tensors the launches are those of real ones, and each has all that its kernel takes."""
    b, h, h_kv, n, m, d, query_block, key_block = 2, 4, 2, 300, 300, 64, 128, 64

    def run() -> None:
        q, k = heads(b, h, n, d, torch.bfloat16), heads(b, h_kv, m, d, torch.bfloat16)
        ids, counts = some_lists(b, h_kv, n, m, query_block, key_block)
        rest = (operands(name, b, h, n, m), torch.tensor(3), 0.1, 0.125, query_block, key_block, "u0")
        out, lse = attention.forward(q, k, k, ids, counts, *rest[0], *rest[1:])
        attention.backward(out, q, k, k, out, lse, ids, counts, *rest[0], *rest[1:], [True] * 3)

    with recorded() as real:
        run()
    with recorded() as fake, FakeTensorMode():
        run()
    assert [x.spec.template for x in real] == ["attention_forward", "attention_backward_q", "attention_backward_kv"]
    assert [(x.spec, x.grid) for x in fake] == [(x.spec, x.grid) for x in real]
    for x in fake:
        assert set(load(x.spec).parameters) <= x.arguments.keys()


@pytest.mark.parametrize(
    ("name", "h_kv", "query_block", "key_block"),
    [("all", 4, 128, 64), ("causal padding", 2, 128, 64), ("documents", 1, 16, 64), ("per head", 1, 8, 128), ("all", 2, 1, 1)],
)
def test_compiles_for_a_gpu(name: str, h_kv: int, query_block: int, key_block: int) -> None:
    """Triton's types are stricter than its interpreter: where masks branch, where lists are gathered, with dropout in runs and without."""
    b, h, n, m, d = 2, 4, 256, 256, 64
    predicate, tensors, sizes, mask, bias = operands(name, b, h, n, m)
    spec = (predicate, tensors, sizes, mask, None if bias is None else bias.bfloat16())
    q, k = heads(b, h, n, d, torch.bfloat16), heads(b, h_kv, m, d, torch.bfloat16)
    ids, counts = some_lists(b, h_kv, n, m, query_block, key_block)
    rest = (torch.tensor(3), 0.1, 0.125, query_block, key_block, "50*tanh(0.02*u0)" if name == "all" else "u0")
    with targeting(KNOWN["sm_90"]), recorded() as launches:
        out, lse = attention.forward(q, k, k, ids, counts, *spec, *rest)
        attention.backward(out, q, k, k, out, lse, ids, counts, *spec, *rest, [True] * 3)
    for launch in launches:
        compiled = compile_ahead(launch, KNOWN["sm_90"])
        assert compiled.shared_memory <= KNOWN["sm_90"].shared_memory and resources(compiled).matrix_instructions


def test_dtypes_without_kernels_are_refused() -> None:
    q = torch.ones(1, 1, 4, 16, dtype=torch.float64)
    ids = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"bfloat16, float16 and float32, got torch.float64"):
        attention.forward(q, q, q, ids, ids[..., 0], "True", [], [], None, None, None, 0.0, 1.0, 4, 4, "u0")
    with pytest.raises(TypeError, match=r"torch.float32, torch.float32 and torch.float16"):
        attention.forward(q.float(), q.float(), q.half(), ids, ids[..., 0], "True", [], [], None, None, None, 0.0, 1.0, 4, 4, "u0")
