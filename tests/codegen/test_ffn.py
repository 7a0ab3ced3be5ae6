"""The routed FFN ops against their definition and against the dense FFN, every gradient by name."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sptc.codegen.ops  # noqa: F401
from sptc.codegen.cpu import ffn as cpu
from sptc.codegen.reference import ffn as reference

ops = torch.ops.sptc
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


@dataclass(frozen=True)
class Case:
    tokens: int = 13
    d: int = 6
    hidden: int = 24
    out: int = 5
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


CASES = {
    "gelu": Case(),
    "conv1d": Case(layout="conv1d", activation="gelu_tanh(u0)"),
    "swiglu fused, no bias": Case(activation="u1*silu(u0)", ups=2, biased=(), layout="fused"),
    "lora everywhere": Case(activation="u1*silu(u0)", ups=2, biased=(1,), adapted=(0, 1), down_lora=True),
    "lora on the second up, dropout": Case(activation="u1*silu(u0)", ups=2, adapted=(1,), down_lora=True, dropout=0.3, lora_dropout=0.2),
    "three ups": Case(activation="u2*tanh(u0)*relu(u1)**2", ups=3, biased=(2, 0), adapted=(1,), scale=False),
    "full lists": Case(active=4, scale=False),
    "one token": Case(tokens=1, active=1, down_lora=True),
    "tokens in different numbers of blocks": Case(lists="kept", down_lora=True, adapted=(0,)),
    "no tokens": Case(tokens=0, down_lora=True, adapted=(0,)),
    "one block": Case(blocks=1, active=1),
    "mixed lists": Case(lists="mixed", down_lora=True, adapted=(0,)),
    "all dropped": Case(dropout=1.0),
}


def make(case: Case, dtype=torch.float64, seed=0):
    """Arguments of sptc::routed_ffn, and the differentiable ones by name."""
    torch.manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    n, d, hidden = case.tokens, case.d, case.hidden
    named = {"x": randn(n, d)}
    if case.layout == "fused":
        gate_up = randn(case.ups * hidden, d)
        ups = list(gate_up.chunk(case.ups))
    else:
        ups = [randn(d, hidden).t() if case.layout == "conv1d" else randn(hidden, d) for _ in range(case.ups)]
    named |= {f"up{i}": w for i, w in enumerate(ups)}
    named |= {f"bias{i}": randn(hidden) for i in case.biased}
    named |= {f"low{i}": randn(n, 3) for i in case.adapted}
    named |= {f"B{i}": randn(hidden, 3) for i in case.adapted}
    named["down"] = randn(hidden, case.out) if case.layout == "conv1d" else randn(case.out, hidden).t()
    if case.down_lora:
        named["down_A"] = randn(3, hidden)
    if case.lists in ("route", "kept"):
        keep = torch.arange(n) % 3 == 1 if case.lists == "kept" else None
        tokens, offsets, _ = ops.route(torch.randn(n, case.blocks), case.active, keep)
    else:  # tokens 0 to 4 everywhere, an empty block, a block with all, and a list longer than its content
        lists = [range(5), [], range(n), [0, 2, 3, 12]]
        tokens = torch.tensor([t for entries in lists for t in entries] + [7, 7, 7], dtype=torch.int32)
        offsets = torch.tensor([0, 5, 5, 5 + n, 9 + n], dtype=torch.int32)
    if case.scale:
        step = 2 if case.layout == "conv1d" else 1  # apart in memory
        named["scale"] = torch.rand(len(tokens) * step, dtype=torch.float64).to(dtype)[::step]
    for name, t in named.items():
        named[name] = t.detach().requires_grad_()
    args = (
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
    return args, named


def detached(args):
    return tuple(
        [t.detach() for t in a]
        if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)
        else a.detach()
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    )


def backward(outputs, named, seed=1):
    torch.manual_seed(seed)
    outputs = (
        [out for out in outputs if out.requires_grad and out.numel()]
        if named["x"].numel()
        else [out for out in outputs if out.requires_grad]
    )
    grads = [torch.randn(out.shape, dtype=torch.float64).to(out.dtype) for out in outputs]
    return dict(zip(named, torch.autograd.grad(outputs, list(named.values()), grads, allow_unused=True), strict=True))


def assert_all_close(got, want, atol):
    assert got.keys() == want.keys()
    for name in want:
        expected = torch.zeros_like(got[name]) if want[name] is None else want[name]
        torch.testing.assert_close(got[name], expected, rtol=atol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case):
    args, named = make(case)
    y, low_out, pre = ops.routed_ffn(*args)
    expected = reference.routed_ffn(*args)
    assert pre.shape == (case.ups, args[9].shape[0], case.hidden // case.blocks) and not pre.isnan().any() and not pre.requires_grad
    assert all(t.is_contiguous() and t.storage_offset() == 0 for t in (y, low_out, pre))
    assert_all_close({"y": y, "low_out": low_out}, {"y": expected[0], "low_out": expected[1]}, 1e-12)
    assert_all_close(backward((y, low_out), named), backward(expected, named), 1e-11)


def dense(args):
    """y and low_out of the dense FFN, in the dtype of its inputs."""
    x, ups, biases, biased, low, up_B, adapted, down, down_A, *_ = args
    us = [x @ w.t() for w in ups]
    for bias, i in zip(biases, biased, strict=True):
        us[i] = us[i] + bias
    for factor, b, i in zip(low, up_B, adapted, strict=True):
        us[i] = us[i] + factor @ b.t()
    a = reference.activation(args[-1], us)
    return a @ down, x.new_empty(0) if down_A is None else a @ down_A.t()


@pytest.mark.parametrize(
    "case", [replace(c, active=c.blocks, scale=False, dropout=0.0, lora_dropout=0.0, lists="route") for c in CASES.values()], ids=CASES
)
def test_full_lists_equal_the_dense_ffn(case):
    args, named = make(case)
    expected = dense(args)
    y, low_out, _ = ops.routed_ffn(*args)
    assert_all_close({"y": y, "low_out": low_out}, {"y": expected[0], "low_out": expected[1]}, 1e-12)
    assert_all_close(backward((y, low_out), named), backward(expected, named), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora everywhere", "conv1d"])
def test_low_precision_is_as_good_as_dense_eager(name, dtype):
    case = replace(CASES[name], tokens=65, d=48, hidden=96, out=40, active=4, scale=False)
    args, named = make(case, dtype)
    exact_args, exact = make(case)
    for key, t in named.items():
        exact[key].data.copy_(t)
    results = []
    for outputs, leaves in ((ops.routed_ffn(*args)[:2], named), (dense(args), named), (dense(exact_args), exact)):
        results.append({"y": outputs[0], "low_out": outputs[1], **backward(outputs, leaves)})
    for label, ours, theirs, true in ((k, *(r[k] for r in results)) for k in results[0]):
        assert ours.dtype == dtype
        if true.numel():
            error, bound = (ours.double() - true).abs().max(), (theirs.double() - true).abs().max()
            assert error <= 2 * bound + torch.finfo(dtype).eps * true.abs().max(), label


def test_a_scale_in_16_bits():
    case = replace(CASES["lora everywhere"], tokens=65, d=48, hidden=96, out=40)
    args, named = make(case, torch.bfloat16)
    exact_args, exact = make(case)
    for key, t in named.items():
        exact[key].data.copy_(t)
    found, wanted = ({**backward(ops.routed_ffn(*a)[:2], leaves)} for a, leaves in ((args, named), (exact_args, exact)))
    assert "scale" in found
    for label, true in wanted.items():
        assert (found[label].double() - true).abs().max() <= 2e-2 * true.abs().max(), label


@pytest.fixture
def one_thread():
    """No work in other threads, where a dispatch mode would not see it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_unit_is_dropped_whatever_the_list():
    args, _ = make(replace(CASES["gelu"], dropout=0.5, scale=False, active=4, out=24, activation="u0"))
    args = list(args)
    args[7] = torch.eye(24, dtype=torch.float64)  # y shows the hidden units
    full = ops.routed_ffn(*args)[0]
    args[9:11] = ops.route(torch.randn(13, 4), 1)[:2]
    few = ops.routed_ffn(*args)[0]
    assert 0 < (full == 0).sum() < full.numel()
    kept = few != 0
    assert kept.any()
    torch.testing.assert_close(few[kept], full[kept], rtol=1e-12, atol=0)


def test_frozen_weights_cost_nothing(one_thread, monkeypatch):
    args, _ = make(CASES["lora everywhere"])
    args = detached(args)
    y, low_out, pre = ops.routed_ffn(*args)
    terms = []
    for name in ("multiply", "add_rows"):
        function = getattr(cpu, name)
        position = 1 if name == "multiply" else 2
        monkeypatch.setattr(cpu, name, lambda *a, f=function, i=position: (terms.extend(a[i]), f(*a))[1])

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, inner=(), kwargs=None):
            self.count += func.overloadpacket is torch.ops.aten.mm
            return func(*inner, **(kwargs or {}))

    def run(need):
        terms.clear()
        with Products() as products:  # a mode does not see into an op
            grads = cpu.routed_ffn_backward(y, low_out, *args, pre, need)
        return grads, products.count + len(terms)

    every, most = run([True] * 11)
    for i in range(11):
        grads, count = run([j == i for j in range(11)])
        assert all((g.shape == (0,)) != (j == i) for j, g in enumerate(grads))
        assert torch.equal(grads[i], every[i])
        assert count < most
    _, only_x = run([True] + [False] * 10)
    assert only_x == 4 * 4  # grad_y down^T, grad_low_out A, and one up each, for every block


def test_weights_are_never_copied():
    case = replace(CASES["lora everywhere"], layout="conv1d", tokens=3)
    args, _ = make(case)
    weight = case.hidden // case.blocks * case.d

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, inner=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ("clone", "copy_", "_to_copy", "contiguous", "stack", "cat") or inner[0].numel() < weight, name
            return func(*inner, **(kwargs or {}))

    frozen = detached(args)
    with Copies():
        y, low_out, pre = cpu.routed_ffn(*frozen)
        cpu.routed_ffn_backward(y, low_out, *frozen, pre, [True] + [False] * 10)


def test_same_bits_every_time():
    case = replace(CASES["lora everywhere"], tokens=200, d=32, hidden=128, out=32)
    args, named = make(case, torch.float32)
    first = ops.routed_ffn(*args)
    grads = backward(first[:2], named)
    for _ in range(3):
        again = ops.routed_ffn(*args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(grads[k], g) for k, g in backward(again[:2], named).items())


@pytest.mark.parametrize("name", ["lora everywhere", "swiglu fused, no bias"])
def test_autocast(name):
    args, named = make(CASES[name], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, low_out, _ = ops.routed_ffn(*args)
    half, _ = make(CASES[name], torch.bfloat16)
    half = (*half[:11], args[11].detach() if args[11] is not None else None, *half[12:])
    expected = ops.routed_ffn(*half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected[0]) and torch.equal(low_out, expected[1])
    grads = backward((y, low_out), named)
    assert all(g.dtype == torch.float32 for g in grads.values())


@pytest.mark.parametrize("name", ["gelu", "swiglu fused, no bias", "lora on the second up, dropout", "mixed lists"])
def test_opcheck(name):
    args, _ = make(CASES[name])
    torch.library.opcheck(ops.routed_ffn.default, args)
    plain = detached(args)
    y, low_out, pre = ops.routed_ffn(*plain)
    sizes = 1 + len(args[1]) + len(args[2]) + 2 * len(args[4]) + 3
    for need in ([True] * sizes, [i % 2 == 0 for i in range(sizes)]):
        need[-2] &= args[8] is not None
        need[-1] &= args[11] is not None
        torch.library.opcheck(ops.routed_ffn_backward.default, (y, low_out if low_out.numel() else None, *plain, pre, need))


def block(x, up, down, router):
    scores = torch.sigmoid(x @ router.t())
    tokens, offsets, index = ops.route(scores, 2)
    scale = 2 * scores.reshape(-1).index_select(0, index)
    return ops.routed_ffn(x, [up], [], [], [], [], [], down.t(), None, tokens, offsets, scale, None, None, 0.0, 0.0, "gelu(u0)")[0]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_a_symbolic_number_of_tokens(backend):
    torch.use_deterministic_algorithms(False)  # Inductor refuses some of its own kernels under it
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, dynamic=True, fullgraph=True)
    for n in (9, 14):
        torch.manual_seed(n)
        leaves = [torch.randn(*shape).requires_grad_() for shape in ((n, 8), (16, 8), (8, 16), (4, 8))]
        got, want = compiled(*leaves), block(*leaves)
        torch.testing.assert_close(got, want)
        grad = torch.randn_like(want)
        for g, w in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({1: []}, "reads 1 up"),
        ({10: torch.zeros(6, dtype=torch.int32)}, "do not divide"),
        ({3: [0, 0]}, "biased"),
        ({14: 0.5, 12: None}, "seed"),
    ],
)
def test_errors_say_what_is_wrong(change, message):
    args = list(detached(make(CASES["gelu"])[0]))
    for i, value in change.items():
        args[i] = value
    with pytest.raises(ValueError, match=message):
        ops.routed_ffn(*args)


def test_backward_under_autocast_keeps_the_dtypes_of_forward():
    args, named = make(replace(CASES["lora everywhere"], tokens=40), torch.float32)
    outputs = ops.routed_ffn(*args)[:2]
    want = backward(outputs, named)
    outputs = ops.routed_ffn(*args)[:2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = backward(outputs, named)
    assert all(torch.equal(got[name], grad) for name, grad in want.items())
