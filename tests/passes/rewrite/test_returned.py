"""What is returned beside the loss: gradients as the dense model's, whatever is computed with it outside, and none of zeros inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from sptc.backend import compile_graph
from sptc.codegen.ops import returned as ops
from sptc.config import Config
from sptc.passes.find import returned
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.passes.ffns import CLASSES, D, Gated, batch

Outputs = tuple[Tensor, ...]


class Model(nn.Module):
    """An FFN, a loss, and what `beside` returns of logits and of what they are computed from."""

    def __init__(self, beside: Callable[[Tensor, Tensor], Outputs]) -> None:
        super().__init__()
        self.first, self.ffn, self.head = nn.Linear(D, D), Gated(), nn.Linear(D, CLASSES)
        self.beside = beside

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Outputs]:
        x = self.first(x)
        x = x + self.ffn(x)
        logits = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), self.beside(logits, x)


BESIDE: dict[str, Callable[[Tensor, Tensor], Outputs]] = {
    "logits": lambda logits, x: (logits,),
    "logits and hidden states": lambda logits, x: (logits, x),
    "logits twice": lambda logits, x: (logits, logits),
    "logits under two shapes": lambda logits, x: (logits.flatten(0, 1), logits.flatten(0, 1).unsqueeze(0)),
    "logits and a cast": lambda logits, x: (logits, logits.double()),
    "a cast and its view": lambda logits, x: (logits.double(), logits.double().flatten()),
    "a cache before its first token": lambda logits, x: (torch.cat([x.new_empty(len(x), 0, D), x], 1), logits),
    "a cache that is part of what it holds": lambda logits, x: (torch.cat([x[:, :0], x], 1), logits),
    "a part": lambda logits, x: (logits[:, -1:], logits),
    "what the loss does not read": lambda logits, x: (logits.tanh(), x),
}
USED: dict[str, Callable[[Tensor, Outputs], Tensor]] = {
    "loss": lambda loss, more: loss,
    "loss and results": lambda loss, more: loss + sum((i + 1) * y.square().mean() for i, y in enumerate(more)),
    "results": lambda loss, more: sum((i + 1) * y.square().mean() for i, y in enumerate(more)) + 0 * loss,
    "one result": lambda loss, more: more[-1].square().mean(),
    "loss and a result that is not dense": lambda loss, more: loss + 3 * more[0].mean(),  # its gradient is one number, expanded
}


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returned, "_LEAST", 0)


def batch_and(model: nn.Module) -> tuple[Outputs, nn.Module]:
    return batch(), copy.deepcopy(model).double()


@pytest.mark.parametrize("used", USED.values(), ids=USED)
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_gradients_are_those_of_the_dense_model(beside: Any, used: Any) -> None:
    torch.manual_seed(0)
    model = Model(beside)
    (x, labels), reference = batch_and(model)
    want = gradients(reference, used(*reference(x.double(), labels)))
    got = gradients(model, used(*torch.compile(model, backend=without_inductor(**FULL), fullgraph=True)(x, labels)))
    # Autograd knows one node of the whole graph: what has no gradient in eager mode has one of zeros there.
    assert_gradients_close({name: got[name] for name in want}, want)
    assert all(bool((g == 0).all()) for name, g in got.items() if name not in want)
    assert not ops._handed


def test_labels_tell_which_tokens_count_for_a_loss_outside_too() -> None:
    """Its tokens get what all units give, the others an eighth of them; the model's own loss is not used. No token reads another here."""
    torch.manual_seed(0)
    model = Model(BESIDE["logits"])
    (x, labels), reference = batch_and(model)

    def train(model: nn.Module, inputs: Outputs, counted: Tensor, **options: Any) -> dict[str, Tensor]:
        torch._dynamo.reset()
        call = torch.compile(model, backend=without_inductor(**FULL | options), fullgraph=True) if options else model
        return gradients(model, call(*inputs)[1][0][counted].square().mean())

    context = {"ffn.context_density": 0.125}
    assert_gradients_close(train(model, (x, labels), labels >= 0, **context), train(reference, (x.double(), labels), labels >= 0))
    others = train(model, (x, labels), labels < 0, **context)["ffn.gate.weight"]
    assert not torch.allclose(others, train(reference, (x.double(), labels), labels < 0)["ffn.gate.weight"].float(), rtol=0.1)


def backward_graph(model: nn.Module, inputs: Outputs, used: Any, **options: Any) -> fx.Graph:
    """The compiled backward graph."""
    graphs: list[fx.Graph] = []

    def backward(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm.graph)
        return make_boxed_func(gm.forward)

    aot = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward), bw_compiler=backward)
    config = Config.from_options(FULL | options)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_graph(gm, example_inputs, config, inner=lambda g, given, _: aot(g, given))

    torch._dynamo.reset()
    used(*torch.compile(model, backend=backend)(*inputs)).backward()
    (graph,) = graphs
    return graph


def test_no_gradient_as_large_as_logits_comes_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(lambda logits, x: (logits.double(), x))
    inputs = batch()

    def large(**options: Any) -> int:
        given = backward_graph(model, inputs, USED["loss"], **options).find_nodes(op="placeholder")
        return sum(n.meta["val"].dim() > 0 for n in given if "tangents" in n.name)

    assert large() == 0
    assert large(inductor={"triton.cudagraphs": True}) == 2  # of which none may depend on numbers of the host
    monkeypatch.setattr(returned, "_LEAST", 1 << 20)
    assert large() == 2


@pytest.mark.parametrize("loss", ["rewritten", "dense"])
def test_no_product_of_logits_is_in_backward(loss: str) -> None:
    """Where the loss takes them as they are: it took their gradients, of the rows that count, in forward."""
    backward = backward_graph(Model(BESIDE["logits"]), batch(), USED["loss"], **{"loss.enabled": loss == "rewritten"})
    products = backward.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    of_logits = [n for n in products if any(CLASSES in operand.meta["val"].shape for operand in n.all_input_nodes)]
    assert len(of_logits) == (0 if loss == "rewritten" else 2)


def test_backward_twice() -> None:
    model = Model(BESIDE["logits"])
    loss, (logits,) = torch.compile(model, backend=without_inductor(**FULL))(*batch())
    reference = copy.deepcopy(model)
    want, (dense,) = reference(*batch())
    for one, other in ((loss, want), (logits.mean(), dense.mean()), (loss + logits.mean(), want + dense.mean())):
        got = torch.autograd.grad(one, [*model.parameters()], retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(other, [*reference.parameters()], retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)
    assert not ops._handed


def test_results_are_tensors_like_any_other() -> None:
    """They carry a gradient that hooks see and change, and they can be written to."""
    torch.manual_seed(0)
    model = Model(BESIDE["logits"])
    (x, labels), reference = batch_and(model)

    def total(loss: Tensor, logits: Tensor) -> Tensor:
        assert logits.requires_grad and not logits.is_leaf
        logits.register_hook(lambda gradient: gradient * 2)
        logits.mul_(logits.detach().clone())
        return loss + logits.sum()

    loss, (logits,) = reference(x.double(), labels)
    want = gradients(reference, total(loss, logits * 1))
    loss, (logits,) = torch.compile(model, backend=without_inductor(**FULL))(x, labels)
    assert not logits._is_view()
    assert_gradients_close(gradients(model, total(loss, logits)), want)


SHARED: dict[str, Callable[[Tensor, Tensor], Outputs]] = {
    "a view": lambda y, x: (y, y.flatten(0, 1)),
    "a slice": lambda y, x: (y, y[:, -1:]),
    "a transpose": lambda y, x: (y.transpose(0, 1), y),
    "what it is taken from": lambda y, x: (y, x),
}


class Shared(nn.Module):
    """Returns what shares memory: of the input, or of logits."""

    def __init__(self, beside: Callable[[Tensor, Tensor], Outputs], of_input: bool) -> None:
        super().__init__()
        self.beside, self.of_input, self.ffn, self.head = beside, of_input, Gated(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Outputs]:
        y = x[:, :-1] if self.of_input else self.head(x + self.ffn(x))
        logits = self.head(y + self.ffn(y)) if self.of_input else y
        return F.cross_entropy(logits.flatten(0, 1), labels[:, : logits.shape[1]].flatten()), self.beside(y, x)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("how", "of_input"), [(how, of_input) for how in SHARED for of_input in (False, True) if of_input or how != "what it is taken from"]
)
def test_a_write_to_a_result_reaches_what_shares_its_memory(how: str, of_input: bool, first: int) -> None:
    torch.manual_seed(0)
    model = Shared(SHARED[how], of_input)
    (x, labels), reference = batch_and(model)

    def of(call: Any, own: nn.Module, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        more = call(x * 1, labels)[1]
        more[first].mul_(2)
        own.zero_grad()
        more[1 - first].square().sum().backward()
        return {name: p.grad for name, p in [*own.named_parameters(), ("x", x)] if p.grad is not None and p.grad.any()}

    want = of(reference, reference, x.double())
    assert_gradients_close(of(torch.compile(model, backend=without_inductor(**FULL)), model, x), want)


def test_a_backward_that_fails_keeps_nothing() -> None:
    model = Model(BESIDE["logits"])
    compiled = torch.compile(model, backend=without_inductor(**FULL))

    def fail(gradient: Tensor) -> None:
        raise KeyError("the user's")

    loss, (logits,) = compiled(*batch())
    loss.register_hook(fail)
    with pytest.raises(KeyError, match="the user's"):
        (loss + logits.square().mean()).backward()
    assert len(ops._handed) == 1
    del loss, logits
    assert not ops._handed


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
def test_a_hook_on_the_node_may_not_change_a_handle(factor: float) -> None:
    model = Model(BESIDE["logits"])
    loss, (logits,) = torch.compile(model, backend=without_inductor(**FULL))(*batch())
    loss.grad_fn.register_prehook(lambda gradients: tuple(None if g is None else g * factor for g in gradients))  # type: ignore[union-attr]
    with pytest.raises(ops.HandleError, match="leave alone the gradient of dtype float64"):
        (loss + logits.square().mean()).backward()


def test_without_gradients_there_are_no_handles() -> None:
    model = Model(BESIDE["logits"])
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    with torch.no_grad():
        _, (logits,) = compiled(*batch())
    assert not logits.requires_grad and torch.equal(logits, model(*batch())[1][0])


class Written(Model):
    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Outputs]:
        loss, (logits,) = super().forward(x, labels)
        logits[:, 0] = 0  # what was read before keeps its gradient, what is returned loses a part
        return loss, (logits,)


def test_what_is_written_to_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Written(BESIDE["logits"])
    (x, labels), reference = batch_and(model)
    used = USED["loss and results"]
    want = gradients(reference, used(*reference(x.double(), labels)))
    assert_gradients_close(gradients(model, used(*torch.compile(model, backend=without_inductor(**FULL))(x, labels))), want)


def test_a_gradient_that_was_handed_over_is_found_once() -> None:
    total, gradient = torch.zeros(2, 3), torch.arange(6.0).view(3, 2)
    handle = torch.ops.sptc.hand_over(gradient)
    torch.ops.sptc.add_handed_(total, torch.zeros((), dtype=torch.float64))
    assert not total.any()
    torch.ops.sptc.add_handed_(total, handle)
    assert torch.equal(total, gradient.view(2, 3)) and not ops._handed
