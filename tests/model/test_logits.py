"""Logits that are computed once they are used: whatever uses them finds the model's, with its gradient, and a step that does not pays
nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sptc
from sptc.model.logits import DeferredLogits
from sptc.passes.find import returned as find_returned
from tests.models.compiled import assert_gradients_close, gradients, without_inductor
from tests.passes.find.losses import ALONE, CLASSES, Model, assert_same, batch, flat


class _Exponential(torch.autograd.Function):
    """As libraries' own losses are: no operator of torch's sees the tensor that autograd hands its gradient to."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].exp()


def first_use(y: Tensor) -> Tensor:
    with torch.inference_mode():
        return y.argmax(-1)


def doubled(y: Tensor) -> Tensor:
    y.mul_(2)
    return y.square()


def part_is_written(y: Tensor) -> Tensor:
    y[:, 1:] = 3 * y[:, 1:] + 1
    y[0].zero_()
    return y.square()


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "a cast": lambda y: y.double().square(),
    "what stands for them otherwise is written": lambda y: (y.detach().mul_(3), y * 2)[1],
    "a copy is older than what is written": lambda y: [z := y.double(), y.mul_(2), z.square() + y][-1],
    "a copy is older than what is written to a part": lambda y: [z := y.double(), y[:, 2:].zero_(), z.exp() + y][-1],
    "a copy is written": lambda y: [z := y.double(), z.mul_(2), z.square() + y][-1],
    "arithmetic": lambda y: y.square() + 1,
    "a loss": lambda y: cross_entropy(y.flatten(0, 1), torch.arange(y[..., 0].numel()) % CLASSES),
    "parts": lambda y: torch.cat([y[:, :3].flatten(), y[..., 5].flatten()]).tanh(),
    "rows by a mask": lambda y: y[y.detach().argmax(-1) % 2 == 0].square(),
    "written in place": doubled,
    "a part is written": part_is_written,
    "a function with a backward of its own": _Exponential.apply,
    "compiled by itself": torch.compile(lambda y: (y * y).tanh(), backend="aot_eager"),
    "one row after another": lambda y: torch.stack([row.exp().mean() for row in y]),
    "a use without gradient before": lambda y: [first_use(y), y[:, 1:].square()][-1],
    "a hook": lambda y: [y.register_hook(lambda gradient: 2 * gradient), y.sin()][1],
    "a checkpoint": lambda y: torch.utils.checkpoint.checkpoint(lambda z: z.exp().sin(), y, use_reentrant=False),
    "into another tensor": lambda y: torch.zeros_like(y).copy_(y).square(),
}

READS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda y: y[0, 0, 0].item(),
    "a list": lambda y: y.tolist(),
    "numpy": lambda y: y.detach().cpu().numpy(),
    "numpy, by force": lambda y: y.numpy(force=True),
    "an array": lambda y: np.asarray(y.detach()),
    "a copy": lambda y: copy.deepcopy(y.detach()),
    "data": lambda y: y.data.clone(),
    "the best classes": lambda y: y.topk(3, dim=-1).indices,
    "its memory": lambda y: torch.frombuffer(bytearray(y.untyped_storage().tolist()), dtype=y.dtype),
    "where its memory is": lambda y: y.data_ptr() != 0 and y.detach().contiguous().data_ptr() != 0,
    "another library's": lambda y: torch.from_dlpack(y.detach()),
    "a file": lambda y: (file := io.BytesIO(), torch.save(y.detach(), file), file.seek(0), torch.load(file))[-1],
    "a file, with its gradient": lambda y: (file := io.BytesIO(), torch.save(y, file), file.seek(0), torch.load(file))[-1].detach(),
    "shared memory": lambda y: y.detach().share_memory_(),
    "text": lambda y: f"{y.detach()} {y[0, 0, 0]:.3f}",
    "equal": lambda y: torch.equal(y, y.detach()),
    "out": lambda y: torch.add(y.detach(), 1, out=torch.empty_like(y)),
}


def logits_of(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Model, Callable[..., Any]]:
    """A model that returns its loss and its logits, whose head is frozen, and its compiled call."""
    monkeypatch.setattr(find_returned, "_LEAST", 0)
    torch.manual_seed(0)
    model = Model(lambda y, t: (cross_entropy(*flat(y, t)), y), nn.Linear(8, CLASSES).requires_grad_(False))
    torch._dynamo.reset()
    return model, torch.compile(model, backend=without_inductor(**ALONE, **options))


# A hook sees nothing of the loss's own gradient in any compiled graph; of what is fp64 already a copy to fp64 is none.
@pytest.mark.parametrize("name", [name for name in USES if name != "a hook" and not name.startswith("a copy")])
def test_whatever_uses_them_has_their_gradient(name, monkeypatch):
    model, compiled = logits_of(monkeypatch)
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    loss, logits = compiled(x, labels)
    assert type(logits) is DeferredLogits
    got = USES[name](logits)
    assert type(got) is Tensor or got is logits
    want_loss, want_logits = reference(x.double(), labels)
    want = USES[name](want_logits)
    torch.testing.assert_close(got.detach().double(), want.detach(), rtol=1e-5, atol=1e-5)
    assert_same(gradients(model, loss + got.mean()), gradients(reference, want_loss + want.mean()))


@pytest.mark.parametrize("name", USES)
def test_their_gradient_alone(name, monkeypatch):
    model, compiled = logits_of(monkeypatch)
    x, labels = batch()
    assert_same(gradients(model, USES[name](compiled(x, labels)[1]).mean()), gradients(model, USES[name](model(x, labels)[1]).mean()))


@pytest.mark.parametrize("name", READS)
def test_whatever_reads_them_finds_them(name, monkeypatch):
    model, compiled = logits_of(monkeypatch)
    got, want = (READS[name](call(*batch())[1]) for call in (compiled, model))
    if isinstance(want, Tensor | np.ndarray | list | float):
        torch.testing.assert_close(got, want)
    else:
        assert got == want


def test_what_does_not_read_them_computes_none(monkeypatch):
    model, compiled = logits_of(monkeypatch)
    x, labels = batch()
    loss, logits = compiled(x, labels)
    want = model(x, labels)[1]
    for said in ("shape", "dtype", "device", "requires_grad", "is_leaf", "layout", "ndim"):
        assert getattr(logits, said) == getattr(want, said)
    assert (logits.size(), logits.stride(), len(logits), logits.dim(), logits.numel()) == (
        want.size(),
        want.stride(),
        len(want),
        3,
        want.numel(),
    )
    assert logits.grad_fn is not None and torch.is_tensor(logits)
    passed_on = logits.detach(), logits.to(torch.bfloat16), logits.float(), logits.clone()
    loss.backward()
    assert not logits._once.computed
    assert logits.sum().item() == pytest.approx(want.sum().item(), rel=1e-5)
    assert logits._once.computed
    for got, dtype in zip(passed_on, (torch.float32, torch.bfloat16, torch.float32, torch.float32), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.detach(), want.detach().to(dtype))


def test_two_steps_do_not_mix(monkeypatch):
    model, compiled = logits_of(monkeypatch)
    batches = [batch(), tuple(-t if t.is_floating_point() else t for t in batch())]
    outputs = [compiled(*each) for each in batches]
    for each, (loss, logits) in reversed(list(zip(batches, outputs, strict=True))):
        want = model(*each)
        assert_same(gradients(model, loss + logits.exp().mean()), gradients(model, want[0] + want[1].exp().mean()))
        torch.testing.assert_close(logits.detach(), want[1].detach())


def test_sizes_that_change(monkeypatch):
    model, compiled = logits_of(monkeypatch)
    for length in (19, 11, 24):
        each = batch(length=length)
        loss, logits = compiled(*each)
        assert logits.shape == (2, length, CLASSES)
        want = model(*each)
        assert_same(gradients(model, loss + logits.exp().mean()), gradients(model, want[0] + want[1].exp().mean()))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside, monkeypatch):
    """The head's weights are fp32, as with LoRA: what is cast in the graph is cast when logits are computed, too."""
    monkeypatch.setattr(find_returned, "_LEAST", 0)

    class Autocast(Model):
        def forward(self, x: Tensor, labels: Tensor) -> Any:
            if inside:
                with torch.autocast("cpu", torch.bfloat16):
                    y = self.head(torch.tanh(self.inner(x)))
            else:
                y = self.head(torch.tanh(self.inner(x)))
            return cross_entropy(*flat(y.float(), labels)), y

    torch.manual_seed(0)
    model = Autocast(lambda y, t: None, nn.Linear(8, CLASSES).requires_grad_(False))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=without_inductor(**ALONE))
    found = []
    for call in (compiled, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            loss, logits = call(*batch())
        assert logits.dtype == torch.bfloat16 and (type(logits) is DeferredLogits) == (call is compiled)
        found.append((logits.detach().clone(), gradients(model, loss + logits.float().exp().mean())))
    torch.testing.assert_close(*(logits for logits, _ in found), rtol=2**-7, atol=2**-7)
    assert_gradients_close(found[0][1], found[1][1], 2e-2)


def test_two_losses_of_what_one_value_is_projected_to(monkeypatch):
    monkeypatch.setattr(find_returned, "_LEAST", 0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.one, self.other = (nn.Linear(8, CLASSES).requires_grad_(False) for _ in range(2))

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            x = torch.tanh(self.inner(x))
            y, z = self.one(x), self.other(x)
            return cross_entropy(*flat(y, labels)) + cross_entropy(*flat(z, labels)), y, z

    torch.manual_seed(0)
    model = Two()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=without_inductor(**ALONE))
    found = []
    for call in (compiled, model):
        loss, y, z = call(*batch())
        assert [type(logits) is DeferredLogits for logits in (y, z)] == [call is compiled] * 2
        found.append((y.detach().clone(), z.detach().clone(), gradients(model, loss + y.exp().mean() + z.sin().mean())))
    torch.testing.assert_close(found[0][:2], found[1][:2])
    assert_same(found[0][2], found[1][2])


@pytest.mark.parametrize("change", [lambda y: y.transpose_(0, 1), lambda y: y.unsqueeze_(0), lambda y: setattr(y, "data", y.data / 2)])
def test_what_they_are_can_not_be_exchanged(change, monkeypatch):
    _, compiled = logits_of(monkeypatch)
    with pytest.raises(RuntimeError, match=r"logits that are computed once they are used can't be .*'loss\.logits': 'keep'"):
        change(compiled(*batch())[1].detach())


CHANGES: dict[str, Callable[[Model, Tensor], Any]] = {
    "in place": lambda model, x: model.head.weight.mul_(2),
    "another storage": lambda model, x: setattr(model.head.weight, "data", torch.zeros_like(model.head.weight)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_they_are_computed_from_may_not_change_before(name, monkeypatch):
    model, compiled = logits_of(monkeypatch)
    x, labels = batch()
    early, late = compiled(x, labels)[1], compiled(x, labels)[1]
    want = model(x, labels)[1].detach()
    torch.testing.assert_close(early.detach(), want)
    with torch.no_grad():
        CHANGES[name](model, x)
    torch.testing.assert_close(early.detach(), want)
    with pytest.raises(sptc.StaleLogitsError, match=r"had changed: use them before .*'loss\.logits': 'keep'"):
        late.sum()


def test_code_behind_a_graph_break_takes_them_as_they_are(monkeypatch):
    monkeypatch.setattr(find_returned, "_LEAST", 0)
    model = Model(lambda y, t: (cross_entropy(*flat(y, t)), y), nn.Linear(8, CLASSES).requires_grad_(False))

    def step(x: Tensor, labels: Tensor) -> Tensor:
        loss, logits = model(x, labels)
        torch._dynamo.graph_break()
        total: Tensor = loss + 1e-2 * logits.logsumexp(-1).square().mean()
        return total

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=without_inductor(**ALONE))
    assert_same(gradients(model, compiled(*batch())), gradients(model, step(*batch())))
