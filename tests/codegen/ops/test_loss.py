"""The loss op against cross entropy in fp64: every option, every gradient, and what it must never hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import sptc.codegen.ops  # noqa: F401  registers the op
from sptc.codegen.ops.returned import _handed, _Returned

OP = torch.ops.sptc.linear_cross_entropy.default
N, D, CLASSES, RANK = 37, 16, 53, 4
NAMES = ("x", "weight", "bias", "low", "up")
CAP = "5*tanh(u0/5)"


def operands(dtype: torch.dtype, adapter: torch.dtype | None = None) -> dict[str, Tensor]:
    sizes = {"x": (N, D), "weight": (CLASSES, D), "bias": (CLASSES,), "low": (N, RANK), "up": (CLASSES, RANK)}
    torch.manual_seed(0)
    kinds = {name: (adapter or dtype) if name in ("low", "up") else dtype for name in NAMES}
    return {name: torch.randn(size).to(kinds[name]) for name, size in sizes.items()}


def some_labels(share: float) -> Tensor:
    labels = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(1))
    return labels.masked_fill(torch.arange(N) % 8 >= round(8 * share), -100)


def by_definition(given: Mapping[str, Tensor], labels: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients by autograd, in the dtype given; in 16 bits the loss is of fp32 logits, as models have it."""
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    scores = linear(leaves["x"], leaves["weight"], leaves["bias"]) + leaves["low"] @ leaves["up"].t()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if options.pop("transform", "u0") == CAP:
        scores = 5 * torch.tanh(scores / 5)
    loss = cross_entropy(scores, labels, **options)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def by_op(
    given: Mapping[str, Tensor],
    labels: Tensor,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    transform: str = "u0",
    rows: int = 5,
    need: tuple[bool, ...] = (True,) * 5,
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: value.clone().requires_grad_(wanted) for (name, value), wanted in zip(given.items(), need, strict=True)}
    outcome = OP(*leaves.values(), labels, None, ignore_index, reduction == "mean", label_smoothing, transform, "", rows, list(need))
    outcome[0].backward()
    return outcome[0].detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_close(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = (got[1][name].double() - gradient).abs().max() / gradient.abs().max().clamp(min=1e-30)
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"transform": CAP},
        {"transform": CAP, "reduction": "sum", "label_smoothing": 0.2},
        {"ignore_index": 7},
    ],
    ids=str,
)
def test_equals_cross_entropy(share, options):
    given, labels = operands(torch.float32), some_labels(share)
    if options.get("ignore_index") == 7:
        labels = labels.masked_fill(labels == -100, 7)
    want = by_definition({name: value.double() for name, value in given.items()}, labels, **options)
    assert_close(by_op(given, labels, **options), want, 2e-6)


@pytest.mark.parametrize("need", [(True,) * 5, (True, False, False, False, False), (False, True, False, True, False)])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("returned", ["u0", CAP])
@pytest.mark.parametrize("at_hand", [True, False], ids=["given", "deferred"])
def test_returned_logits(at_hand, returned, share, need):
    """It takes them in place of those that it would compute, if it is given them, and gives their own gradient to what they are made of."""
    given, labels = operands(torch.float64), some_labels(share)
    weights = torch.randn(N, CLASSES, dtype=torch.float64)

    def leaves() -> list[Tensor]:
        return [value.clone().requires_grad_(wanted) for value, wanted in zip(given.values(), need, strict=True)]

    def logits(x: Tensor, weight: Tensor, bias: Tensor, low: Tensor, up: Tensor) -> Tensor:
        return linear(x, weight, bias) + low @ up.t()

    for outside in ("nothing", "logits", "logits alone"):
        ours, theirs = leaves(), leaves()
        scores = logits(*theirs)
        capped = scores if returned == "u0" else 5 * torch.tanh(scores / 5)
        want = cross_entropy(capped, labels, label_smoothing=0.1, reduction="sum")
        given_logits = scores.detach() if at_hand else None
        loss, *_, handle = OP(*ours, labels, given_logits, -100, False, 0.1, returned, returned, 5, list(need))
        result = _Returned.apply(capped.detach(), handle, torch.detach)
        torch.testing.assert_close(loss, want)
        for total, value, of_logits in ((loss, ours, result), (want, theirs, capped)):
            what = (0 if outside == "logits alone" else total) + (0 if outside == "nothing" else (weights * of_logits).sum())
            assert isinstance(what, Tensor)
            what.backward()
            assert [x.grad is not None for x in value] == list(need)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
    assert not _handed


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_is_made_of_a_loss_without_labels_has_no_gradient(share, options):
    """A mean of nothing is NaN, and so is the gradient of its square; none of it reaches a row."""

    def squared(loss: Callable[..., Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in operands(torch.float64).items()}
        loss(leaves).square().backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def dense(leaves: dict[str, Tensor]) -> Tensor:
        return cross_entropy(linear(leaves["x"], leaves["weight"], leaves["bias"]) + leaves["low"] @ leaves["up"].t(), labels, **options)

    def op(leaves: dict[str, Tensor]) -> Tensor:
        mean, smoothing = options.get("reduction", "mean") == "mean", options.get("label_smoothing", 0.0)
        loss: Tensor = OP(*leaves.values(), labels, None, -100, mean, smoothing, "u0", "", 5, [True] * 5)[0]
        return loss

    labels = some_labels(share)
    got, want = squared(op), squared(dense)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)
        assert bool(gradient.any()) == (share > 0)


@pytest.mark.parametrize("adapter", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_no_worse_than_autograd(dtype, adapter):
    """Errors against fp64 stay within those of plain autograd in the same dtypes, and a rounding of the result."""
    given, labels = operands(dtype, adapter), some_labels(0.5)
    loss, want = by_definition({name: value.double() for name, value in given.items()}, labels)
    got_loss, got = by_op(given, labels)
    plain_loss, plain = by_definition(given, labels) if adapter is None else (loss, want)
    rounding = 2 * torch.finfo(dtype).eps
    assert abs(got_loss - loss) <= abs(plain_loss - loss) + rounding * loss
    for name, gradient in want.items():
        errors = [float((g[name].double() - gradient).abs().max() / gradient.abs().max()) for g in (got, plain)]
        assert got[name].dtype == given[name].dtype
        assert errors[0] <= errors[1] + rounding, (name, errors)


def test_one_operand_alone_may_need_its_gradient():
    given, labels = operands(torch.float32), some_labels(0.5)
    _, want = by_op(given, labels)
    for i, name in enumerate(NAMES):
        _, got = by_op(given, labels, need=tuple(j == i for j in range(5)))
        assert got.keys() == {name}
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-7)


def test_a_gradient_that_was_not_foreseen_is_an_error():
    given = {name: value.requires_grad_() for name, value in operands(torch.float32).items()}
    with pytest.raises(AssertionError, match=r"gradients of operands \[1\] are asked for and were not computed"):
        OP(*given.values(), some_labels(1.0), None, -100, True, 0.0, "u0", "", 5, [True, False, True, True, True])


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_label_out_of_range_raises(label):
    labels = some_labels(1.0)
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        by_op(operands(torch.float32), labels)


def test_weight_may_be_a_transposed_view():
    given, labels = operands(torch.float32), some_labels(0.5)
    _, want = by_op(given, labels)
    _, got = by_op({**given, "weight": given["weight"].t().contiguous().t()}, labels)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(optional):
    given = {name: value.requires_grad_() for name, value in operands(torch.float32).items()}
    tensors = list(given.values()) if optional else [given["x"], given["weight"], None, None, None]
    need = [t is not None for t in tensors]
    torch.library.opcheck(OP, (*tensors, some_labels(0.5), None, -100, True, 0.1, CAP, "u0", 5, need))


def test_never_holds_more_than_a_few_rows(monkeypatch):
    """No tensor that it makes is larger than one chunk of logits, or than a gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.seen = max(self.seen, result.untyped_storage().nbytes())
            return result

    from sptc.codegen.ops.chunked_loss import loss_and_gradients

    x, weight = torch.randn(256, D), torch.randn(1000, D)
    with Largest() as largest:
        loss_and_gradients(
            x, weight, None, None, None, torch.zeros(256, dtype=torch.long), None, -100, 0.1, CAP, 16, [True, False] + [False] * 3
        )
    assert 16 * 1000 * 4 <= largest.seen <= max(16 * 1000 * 4, weight.untyped_storage().nbytes())


def test_products_have_few_numbers_of_rows():
    """oneDNN makes a kernel for each, and keeps a thousand of them; how many labels count is data."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from sptc.codegen.ops.chunked_loss import loss_and_gradients

    class Products(TorchDispatchMode):
        rows: set[int] = set()  # noqa: RUF012  of one test

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                self.rows.add(args[-2].shape[0])
            return func(*args, **(kwargs or {}))

    given = operands(torch.float64)
    for count in range(1, N + 1):
        labels = some_labels(1.0).masked_fill(torch.arange(N) >= count, -100)
        with Products() as products:
            loss_and_gradients(*given.values(), labels, None, -100, 0.1, CAP, 32, [True] * 5)
        got = by_op(given, labels, label_smoothing=0.1, transform=CAP, rows=32)
        assert_close(got, by_definition(given, labels, label_smoothing=0.1, transform=CAP), 1e-12)
    assert products.rows - {D, RANK, CLASSES} <= {4, 8, 12, 16, 20, 24, 28, 32}
