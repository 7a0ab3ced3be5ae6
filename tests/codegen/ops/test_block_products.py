"""Products of list entries with the weights of their blocks: against einsum over every entry, on each way of computing them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sptc.codegen.ops  # noqa: F401
from sptc.codegen.ops import block_products as by

ops = torch.ops.sptc
WAYS = {
    "op": (ops.gather_product, ops.scatter_product, ops.outer_product),
    "grouped": (by.grouped_gather_product, by.grouped_scatter_product, by.grouped_outer_product),
}
N, BLOCKS, WIDTH, FEATURES = 11, 4, 8, 16
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


def lists() -> tuple[Tensor, Tensor, Tensor]:
    """tokens, blocks, offsets; block 1 is used by none."""
    tokens, blocks = torch.tensor([(0, 0), (3, 0), (10, 0), (0, 2), (1, 2), (2, 2), (9, 2), (5, 3)]).unbind(1)
    return tokens, blocks, torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32)


def operands(dtype: torch.dtype, width: int = WIDTH, features: int = FEATURES) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, width), (N, features), (BLOCKS, width, features))
    h, x, weight = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return h, x, weight


def expected(h: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, blocks, _ = lists()
    h, x, weight = h.double(), x.double(), weight.double()
    y = torch.zeros_like(x).index_add(0, tokens, torch.einsum("sw,swf->sf", h, weight[blocks]))
    outer = torch.zeros_like(weight).index_add(0, blocks, torch.einsum("sw,sf->swf", h, x[tokens]))
    return torch.einsum("sf,swf->sw", x[tokens], weight[blocks]), y, outer


def every(way: str, h: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, offsets = lists()
    gather, scatter, outer = WAYS[way]
    return gather(x, weight, tokens, offsets), scatter(h, weight, tokens, offsets, len(x)), outer(h, x, tokens, offsets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_products_are_those_of_the_definition(way: str, dtype: torch.dtype) -> None:
    h, x, weight = operands(dtype)
    for got, want in zip(every(way, h, x, weight), expected(h, x, weight), strict=True):
        bound = 4 * torch.finfo(dtype).eps * want.abs().max()
        assert got.dtype == dtype and got.shape == want.shape and (got.double() - want).abs().max() <= bound


def test_a_gpus_products_are_one_call_each_where_rows_have_whole_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    grouped = torch._grouped_mm
    monkeypatch.setattr(torch, "_grouped_mm", lambda a, b, offs: calls.append(a.dtype) or grouped(a, b, offs=offs))
    every("grouped", *operands(torch.bfloat16))
    assert len(calls) == 3
    for odd in (operands(torch.bfloat16, features=5), operands(torch.float64)):
        for got, want in zip(every("grouped", *odd), every("op", *odd), strict=True):
            assert torch.equal(got, want)
    assert len(calls) == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", ["[out, in]", "[in, out]"])
@pytest.mark.parametrize(("width", "features"), [(WIDTH, FEATURES), (72, 80)])  # of thin matrices products are torch's own
def test_weights_have_any_strides(way: str, stored: str, width: int, features: int) -> None:
    """Blocks of an up projection are rows of its weight, those of a down projection columns, and Conv1D turns both around."""
    h, x, _ = operands(torch.float32, width, features)
    whole = torch.randn(BLOCKS * width, features)
    weight = (whole if stored == "[out, in]" else whole.t().contiguous().t()).unflatten(0, (BLOCKS, width))
    for got, want in zip(every(way, h, x, weight), expected(h, x, weight), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_of_any_order(check: Callable[..., bool]) -> None:
    h, x, weight = (t.requires_grad_() for t in operands(torch.float64, width=3, features=2))
    tokens, _, offsets = lists()
    assert check(lambda x, w: ops.gather_product(x, w, tokens, offsets), (x, weight))
    assert check(lambda h, w: ops.scatter_product(h, w, tokens, offsets, N), (h, weight))
    assert check(lambda h, x: ops.outer_product(h, x, tokens, offsets), (h, x))


def test_only_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a frozen FFN cost nothing in backward."""
    monkeypatch.setattr(by, "ops", None)
    h, x, weight = operands(torch.float32)
    tokens, _, offsets = lists()
    context = type("Context", (), {"saved_tensors": (x, weight, tokens, offsets), "needs_input_grad": (False, False)})
    assert by._gather_backward(context, h) == (None, None, None, None)


def test_sixteen_bit_sums_are_taken_in_fp32() -> None:
    """256 blocks that each add a little to what is large: in bf16 it would be lost."""
    blocks = 256
    tokens, offsets = torch.zeros(blocks, dtype=torch.int64), torch.arange(blocks + 1, dtype=torch.int32)
    h = torch.full((blocks, 8), 1 / 8, dtype=torch.bfloat16)
    weight = torch.full((blocks, 8, 8), 0.25, dtype=torch.bfloat16)
    weight[0] = 64.0
    for scatter in (ops.scatter_product, by.grouped_scatter_product):
        assert scatter(h, weight, tokens, offsets, 1)[0, 0] == 128.0  # 64 + 255 / 4 = 127.75


def test_autocast_decides_the_dtype() -> None:
    h, x, weight = operands(torch.float32)
    tokens, _, offsets = lists()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.gather_product(x, weight, tokens, offsets).dtype == torch.bfloat16
        assert ops.scatter_product(h, weight, tokens, offsets, N).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="one dtype"):
        ops.gather_product(x, weight.bfloat16(), tokens, offsets)


@pytest.mark.parametrize("count", [0, 8])
def test_opcheck(count: int) -> None:
    h, x, weight = (t.requires_grad_() for t in operands(torch.float32))
    tokens, _, offsets = lists()
    if not count:
        h, tokens, offsets = h[:0], tokens[:0], torch.zeros_like(offsets)
    torch.library.opcheck(ops.gather_product.default, (x, weight, tokens, offsets))
    torch.library.opcheck(ops.scatter_product.default, (h, weight, tokens, offsets, N))
    torch.library.opcheck(ops.outer_product.default, (h, x, tokens, offsets))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 16), (torch.float32, 16), (torch.bfloat16, 1)])  # in eps; a sum has 640 terms
def test_products_have_few_numbers_of_rows(dtype: torch.dtype, bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 640 tokens, seven in three products: multiples of 40 up to 280."""
    seen: set[tuple[int, ...]] = set()
    multiply = by._multiply
    monkeypatch.setattr(by, "_multiply", lambda a, b: (seen.add((*a.shape, b.shape[1])), multiply(a, b))[1])
    generator = torch.Generator().manual_seed(0)
    width, features = 72, 80
    x, weight = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in ((640, features), (1, width, features)))
    for used in range(1, 641, 7):
        tokens = torch.randperm(640, generator=generator)[:used].sort().values
        h = torch.randn(used, width, generator=generator, dtype=torch.float64).to(dtype)
        lists = tokens, torch.tensor([0, used], dtype=torch.int32)
        got = by.gather_product(x, weight, *lists), by.scatter_product(h, weight, *lists, 640), by.outer_product(h, x, *lists)
        rows = x[tokens].double()
        added = torch.zeros(640, features, dtype=torch.float64).index_add(0, tokens, h.double() @ weight[0].double())
        for one, want in zip(got, (rows @ weight[0].double().t(), added, (h.double().t() @ rows)[None]), strict=True):
            assert (one.double() - want).abs().max() <= bound * torch.finfo(dtype).eps * want.abs().max()
    assert len(seen) <= 3 * 7
