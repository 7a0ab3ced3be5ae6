"""The routed FFN's kernels, in Triton's interpreter, against the definition in fp64: outputs and every gradient by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sptc.codegen.cpu import ffn as cpu
from sptc.codegen.kernels import ffn, route
from sptc.codegen.launch import Launch, recorded
from sptc.codegen.reference import ffn as reference
from sptc.codegen.specialize import specialize
from sptc.codegen.tiling import Tiling, using

EIGHT_OPS = "0.5*u0*(1.0 + tanh(0.7978845608028654*(u0 + 0.044715*u0**3)))"


@dataclass(frozen=True)
class Case:
    tokens: int = 13
    d: int = 20
    width: int = 12
    out: int = 36
    blocks: int = 4
    active: int = 2
    activation: str = "gelu(u0)"
    ups: int = 1
    biased: tuple[int, ...] = (0,)
    adapted: tuple[int, ...] = ()
    down_lora: bool = False
    scale: bool = True
    dropout: float = 0.0
    lora_dropout: float = 0.0
    layout: str = "linear"  # or "conv1d", "fused"
    lists: str = "route"
    rank: int = 3


CASES = {
    "relu": Case(activation="relu(u0)"),
    "gelu, wide blocks": Case(width=40, d=32),
    "eight-op gelu, conv1d, dropout": Case(activation=EIGHT_OPS, layout="conv1d", dropout=0.3),
    "swiglu fused, no bias, no scale": Case(activation="u1*silu(u0)", ups=2, biased=(), layout="fused", scale=False),
    "lora everywhere": Case(activation="u1*silu(u0)", ups=2, biased=(1,), adapted=(0, 1), down_lora=True, width=20),
    "lora on the second up, dropout": Case(
        activation="u1*silu(u0)", ups=2, adapted=(1,), down_lora=True, dropout=0.3, lora_dropout=0.2, width=20
    ),
    "lora in conv1d, lora dropout": Case(layout="conv1d", adapted=(0,), down_lora=True, lora_dropout=0.4, scale=False, rank=20),
    "three ups": Case(activation="u2*tanh(u0)*relu(u1)**2", ups=3, biased=(2, 0), adapted=(1,), scale=False, dropout=0.2, width=33),
    "full lists": Case(active=4, scale=False),
    "one token": Case(tokens=1, active=1, down_lora=True),
    "tokens in different numbers of blocks": Case(lists="kept", down_lora=True, adapted=(0,)),
    "no tokens": Case(tokens=0, down_lora=True, adapted=(0,)),
    "one block": Case(blocks=1, active=1),
    "mixed lists": Case(lists="mixed", down_lora=True, adapted=(0,), lora_dropout=0.3, width=13),
    "all dropped": Case(dropout=1.0),
    "many entries": Case(tokens=70, active=3, d=16, out=16),
}


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 16 and 32, so that lists, blocks and rows all take several, the last ones partial."""
    sizes = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 2}
    with ExitStack() as stack:
        for template in ("grouped_product", "grouped_outer"):
            stack.enter_context(using(template, Tiling.of(1, 1, **sizes)))
        for template in ("ffn_up", "ffn_grad_hidden"):
            stack.enter_context(using(template, Tiling.of(1, 1, **sizes, SLICES=2)))
        stack.enter_context(using("gather_sum", Tiling.of(1, 1, BLOCK_T=4, BLOCK_C=32)))
        yield


def make(case: Case, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Arguments of sptc::routed_ffn, and the differentiable ones by name, in the order of `need`."""
    torch.manual_seed(0)

    def randn(*shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * by).to(dtype)

    n, d, hidden = case.tokens, case.d, case.width * case.blocks
    by = d**-0.5
    named = {"x": randn(n, d)}
    if case.layout == "fused":
        ups = list(randn(case.ups * hidden, d, by=by).chunk(case.ups))
    else:
        ups = [randn(d, hidden, by=by).t() if case.layout == "conv1d" else randn(hidden, d, by=by) for _ in range(case.ups)]
    named |= {f"up{i}": w for i, w in enumerate(ups)}
    named |= {f"bias{i}": randn(hidden) for i in case.biased}
    named |= {f"low{i}": randn(n, case.rank) for i in case.adapted}
    named |= {f"B{i}": randn(hidden, case.rank, by=0.5) for i in case.adapted}
    down = randn(hidden, case.out, by=hidden**-0.5)
    named["down"] = down if case.layout == "conv1d" else down.t().contiguous().t()
    if case.down_lora:
        named["down_A"] = randn(case.rank, hidden, by=hidden**-0.5)
    if case.lists in ("route", "kept"):
        keep = torch.arange(n) % 3 == 1 if case.lists == "kept" else None
        tokens, offsets, _ = cpu.route(torch.randn(n, case.blocks), case.active, keep)
    else:  # tokens 0 to 4 everywhere, an empty block, a block with all, one out of order, and a list longer than its content
        lists = [range(5), [], range(n), [12, 0, 3, 2]]
        tokens = torch.tensor([t for entries in lists for t in entries] + [7] * 40, dtype=torch.int32)
        offsets = torch.tensor([0, 5, 5, 5 + n, 9 + n], dtype=torch.int32)
    if case.scale:
        named["scale"] = torch.rand(len(tokens), dtype=torch.float64).to(dtype)
    return arguments(case, named, tokens, offsets), named


def arguments(case: Case, named: dict[str, Tensor], tokens: Tensor, offsets: Tensor) -> tuple[Any, ...]:
    return (
        named["x"],
        [named[f"up{i}"] for i in range(case.ups)],
        [named[f"bias{i}"] for i in case.biased],
        list(case.biased),
        [named[f"low{i}"] for i in case.adapted],
        [named[f"B{i}"] for i in case.adapted],
        list(case.adapted),
        named["down"],
        named.get("down_A"),
        tokens,
        offsets,
        named.get("scale"),
        torch.tensor([5]),
        torch.tensor([2**40 + 7]),
        case.dropout,
        case.lora_dropout,
        case.activation,
    )


def needed(args: tuple[Any, ...]) -> list[bool]:
    """Everything that these arguments have a gradient for."""
    _, up, up_bias, _, low, up_B, _, _, down_A, _, _, scale, *_ = args
    return [True] * (1 + len(up) + len(up_bias) + len(low) + len(up_B) + 1) + [down_A is not None, scale is not None]


def incoming(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    grad_y = torch.randn(case.tokens, case.out, dtype=torch.float64).to(dtype)
    return grad_y, torch.randn(case.tokens, case.rank, dtype=torch.float64).to(dtype) if case.down_lora else None


def expected(case: Case, args: tuple[Any, ...], named: dict[str, Tensor], grads: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
    """y, low_out and the gradient of each name, from the definition in fp64 with the same values and lists."""
    leaves = {name: t.double().requires_grad_() for name, t in named.items()}
    y, low_out = reference.routed_ffn(*arguments(case, leaves, args[9], args[10]))
    loss = (y * grads[0].double()).sum()
    if grads[1] is not None:
        loss = loss + (low_out * grads[1].double()).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), "low_out": low_out.detach(), **dict(zip(named, found, strict=True))}


def check(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    args, named = make(case, dtype)
    grads = incoming(case, dtype)
    want = expected(case, args, named, grads)
    y, low_out, pre = ffn.routed_ffn(*args)
    found = ffn.routed_ffn_backward(*grads, *args, pre, needed(args))
    outputs = [y, low_out, *(g for g, flag in zip(found, needed(args), strict=True) if flag)]
    assert len(outputs) == len(want)
    assert pre.shape == (case.ups, len(args[9]), case.width)
    assert torch.equal(pre[:, int(args[10][-1]) :], torch.zeros_like(pre[:, int(args[10][-1]) :]))
    assert not pre.isnan().any()
    for (name, true), got in zip(want.items(), outputs, strict=True):
        assert got.shape == true.shape and got.dtype == dtype, name
        assert got.is_contiguous() and got.storage_offset() == 0, name
        if true.numel():
            error, size = (got.double() - true).abs().max(), true.abs().max()
            assert error <= tolerance * max(size, 1e-2), f"{name}: off by {error:.2e}, values up to {size:.2e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case: Case, small_tiles: None) -> None:
    check(case, torch.float32, 2e-6)


@pytest.mark.parametrize("name", ["relu", "lora on the second up, dropout", "three ups", "mixed lists"])
def test_half_precision(name: str, small_tiles: None) -> None:
    check(CASES[name], torch.float16, 3e-3)


@pytest.mark.parametrize("name", ["lora on the second up, dropout", "eight-op gelu, conv1d, dropout"])
def test_default_tiles(name: str) -> None:
    check(replace(CASES[name], width=24), torch.float32, 2e-6)


def test_operands_with_gaps(small_tiles: None) -> None:
    """Rows and weights that are slices of larger tensors, and a gradient that is expanded from one number."""
    case = CASES["lora everywhere"]
    args, named = make(case, torch.float32)
    gaps = {name: torch.nn.functional.pad(t, (3, 2))[..., 3:-2] for name, t in named.items() if t.dim() == 2}
    gaps["x"] = named["x"].t().contiguous().t()
    assert not any(t.is_contiguous() for t in gaps.values())
    spread = arguments(case, {**named, **gaps}, args[9], args[10])
    grads = (torch.ones(1, 1).expand(case.tokens, case.out), torch.ones(1, 1).expand(case.tokens, case.rank))
    plain = ffn.routed_ffn(*args)
    apart = ffn.routed_ffn(*spread)
    assert all(torch.equal(a, b) for a, b in zip(plain, apart, strict=True))
    found = ffn.routed_ffn_backward(*grads, *spread, apart[2], needed(args))
    wanted = ffn.routed_ffn_backward(*(g.contiguous() for g in grads), *args, plain[2], needed(args))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def launched(launches: list[Launch]) -> list[str]:
    return [launch.spec.template for launch in launches]


def test_each_gradient_alone(small_tiles: None) -> None:
    case = replace(CASES["lora everywhere"], tokens=5, lora_dropout=0.5)
    args, named = make(case, torch.float32)
    grads = incoming(case, torch.float32)
    pre = ffn.routed_ffn(*args)[2]
    with recorded(run=True) as most:
        every = ffn.routed_ffn_backward(*grads, *args, pre, needed(args))
    for i, name in enumerate(named):
        need = [j == i for j in range(len(named))]
        with recorded(run=True) as launches:
            alone = ffn.routed_ffn_backward(*grads, *args, pre, need)
        assert [g.shape != (0,) for g in alone] == need, name
        torch.testing.assert_close(alone[i], every[i], msg=lambda text, name=name: f"{name}: {text}")
        assert len(launches) < len(most)
        if name == "x":
            assert launched(launches) == ["ffn_grad_hidden", "grouped_product", "invert_lists", "gather_sum"]
    assert ffn.routed_ffn_backward(*grads, *args, pre, [False] * len(named))[0].shape == (0,)


def test_down_lora_without_its_gradient(small_tiles: None) -> None:
    case = replace(CASES["lora everywhere"], tokens=5)
    args, named = make(case, torch.float32)
    grad_y, _ = incoming(case, torch.float32)
    want = expected(case, args, named, (grad_y, None))
    found = dict(zip(named, ffn.routed_ffn_backward(grad_y, None, *args, ffn.routed_ffn(*args)[2], needed(args)), strict=True))
    assert torch.equal(found["down_A"], torch.zeros_like(named["down_A"]))
    for name in named:
        torch.testing.assert_close(found[name].double(), want[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_launches_without_a_device(where: str) -> None:
    case = replace(CASES["lora on the second up, dropout"], tokens=64, d=256, width=384, out=256)
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        named = {"x": torch.empty(64, 256), "up0": torch.empty(1536, 256), "up1": torch.empty(1536, 256), "bias0": torch.empty(1536)}
        named |= {"low1": torch.empty(64, 3), "B1": torch.empty(1536, 3), "down": torch.empty(1536, 256), "down_A": torch.empty(3, 1536)}
        named |= {"scale": torch.empty(128)}
        scores = torch.empty(64, 4)
        with recorded() as launches:
            tokens, offsets, index = route.route(scores, 2, torch.empty(64, dtype=torch.bool))
            args = arguments(case, {name: t.bfloat16() for name, t in named.items()}, tokens, offsets)
            y, low_out, pre = ffn.routed_ffn(*args)
            grads = ffn.routed_ffn_backward(y, low_out, *args, pre, needed(args))
    assert (tokens.shape, offsets.shape, index.shape) == ((128,), (5,), (128,))
    assert [g.shape for g in grads] == [t.shape for t in named.values()]
    assert launched(launches)[:6] == ["ffn_up", "grouped_product", "invert_lists", "gather_sum", "grouped_product", "gather_sum"]
    assert set(launched(launches)[6:]) == {
        "ffn_grad_hidden", "grouped_product", "invert_lists", "gather_sum", "grouped_outer", "grouped_sum"
    }  # fmt: skip
    up = launches[0]
    sizes = dict(up.spec.constants)
    rows = (128 + 5 * (sizes["BLOCK_M"] - 1)) // sizes["BLOCK_M"]  # nearly a row tile more for each list, since it may end anywhere
    assert up.grid == (rows * -(-384 // sizes["BLOCK_N"]),)


def test_emitted_code_has_only_what_the_call_needs() -> None:
    def source(case: Case) -> str:
        args, _ = make(case, torch.float32)
        with recorded() as launches:
            ffn.routed_ffn(*args)
        return specialize(launches[0].spec)

    plain = source(replace(CASES["relu"], biased=(), scale=False))
    assert not any(word in plain for word in ("philox", "scale", "bias", "up_B", "SLICES"))
    gated = source(CASES["lora on the second up, dropout"])
    assert gated.count("tl.load(x_tile") == 1 and gated.count("tl.dot(") == 3 and "up_B_0" not in gated and "philox" in gated


def test_route_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    scores = torch.randn(37, 8)
    scores[3] = 0.5  # ties
    scores[4, 2] = float("nan")
    scores[5] = torch.tensor([1.0, 2, 2, 2, 1, 2, 0, 0])
    scores[:, 6] = -100.0  # a block that nobody wants
    for rows in (scores, scores[:1], scores[:0]):
        for active in (1, 3, 8):
            got, want = route.route(rows, active), cpu.route(rows, active)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


def test_index_of_lists_of_any_content() -> None:
    blocks, count = 5, 300
    torch.manual_seed(0)
    lists = [torch.randperm(count)[:size].tolist() for size in (300, 0, 17, 299, 1)]
    tokens = torch.tensor([t for entries in lists for t in entries] + [0] * 9, dtype=torch.int32)
    offsets = torch.tensor([0, *torch.tensor([len(entries) for entries in lists]).cumsum(0).tolist()], dtype=torch.int32)
    index = route.invert(tokens, offsets, count)
    assert index.entries.shape == (count, blocks)
    for t in range(count):
        assert sorted(index.entries[t, : index.counts[t]].tolist()) == (tokens[: offsets[-1]] == t).nonzero().flatten().tolist()


def test_a_tokens_blocks_are_summed_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order the index has: (1e8 + 1) - 1e8 is 0 in fp32, and 1 in other orders."""
    args, _ = make(Case(tokens=1, d=16, width=16, out=16, blocks=3, active=3, activation="relu(u0)", biased=(), scale=False), torch.float32)
    units = torch.cat([torch.full((16,), value) for value in (1e8, 1.0, -1e8)])
    x, up, down = torch.zeros(1, 16), torch.zeros(48, 16), torch.zeros(48, 16)
    x[0, 0], up[::16, 0], down[:, 0] = 1.0, 1.0, units
    args = (x, [up], *args[2:7], down, *args[8:])
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        index = route.Index(torch.tensor([3], dtype=torch.int32), torch.tensor([order], dtype=torch.int32))
        monkeypatch.setattr(ffn, "invert", lambda *_, index=index: index)
        assert ffn.routed_ffn(*args)[0][0, 0] == 0.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({12: None, 14: 0.5}, ValueError, "needs a seed"),
        ({0: torch.zeros(13, 20, dtype=torch.float64)}, TypeError, "float32, float64"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[int, Any], error: type[Exception], message: str) -> None:
    args = list(make(CASES["relu"], torch.float32)[0])
    for i, value in change.items():
        args[i] = value
    with pytest.raises(error, match=message):
        ffn.routed_ffn(*args)
