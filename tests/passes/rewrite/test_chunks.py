"""An FFN in chunks of its tokens: exact, whatever it is made of, and the hidden values of all tokens are in no graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import sptc
from sptc.backend import compile_graph
from sptc.config import Config
from tests.models.compiled import assert_gradients_close, gradients, without_inductor
from tests.passes.ffns import HIDDEN, D, Fused, Gated, Model, Plain, batch, model_of

WHOLE: dict[str, Any] = {"max_rise": 0.0, "ffn.recompute": True, "ffn.padding": "compute"}
CHUNKS: dict[str, Any] = {**WHOLE, "ffn.chunk": 13}
FORMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "units": {"ffn.density": 0.75, "ffn.context_density": None},
    "linear": {"ffn.density": 0.75, "ffn.context_density": None, "ffn.left_out": "linear"},
    "apart": {"ffn.density": 1.0, "ffn.context_density": 0.25},
}


def chunk_of(compiled: Any) -> int | None:
    (region,) = [r for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert region.status == "rewritten" and region.settings is not None
    return region.settings["chunk"]


def assert_as_dense_in_chunks(model: nn.Module) -> None:
    """41 tokens, 13 at a time: every gradient is that of the dense model in fp64."""
    reference = copy.deepcopy(model).double()
    x, labels = batch(41)
    compiled = torch.compile(model, backend=without_inductor(**CHUNKS))
    got = gradients(model, compiled(x, labels))
    assert chunk_of(compiled) == 13
    assert_gradients_close(got, gradients(reference, reference(x.double(), labels)))


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "lora"])
@pytest.mark.parametrize("ffn", [Gated, Fused, Plain])
def test_every_gradient_is_that_of_the_dense_ffn(ffn: Callable[[], nn.Module], adapted: bool) -> None:
    model = model_of(ffn, adapted)
    assert_as_dense_in_chunks(model)


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "lora"])
@pytest.mark.parametrize("form", ["units", "apart"])
def test_over_fewer_units_it_is_what_all_at_once_are(form: str, adapted: bool) -> None:
    model, inputs = model_of(Gated, adapted), batch(41)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=without_inductor(**{**CHUNKS, **FORMS[form]}))
    got = gradients(model, loss := compiled(*inputs))
    assert chunk_of(compiled) == 13
    torch._dynamo.reset()
    whole = torch.compile(reference, backend=without_inductor(**{**WHOLE, **FORMS[form]}))
    torch.testing.assert_close(loss, expected := whole(*inputs))
    assert chunk_of(whole) is None
    assert_gradients_close(got, gradients(reference, expected))


class Of(nn.Module):
    """An FFN of any activation, of one up projection or two."""

    def __init__(self, act: Callable[..., Tensor], ups: int) -> None:
        super().__init__()
        self.ups, self.down, self.act = nn.ModuleList(nn.Linear(D, HIDDEN) for _ in range(ups)), nn.Linear(HIDDEN, D), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(*(up(x) for up in self.ups)))


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in ("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus")},
    **{name: getattr(F, name) for name in ("hardswish", "hardsigmoid", "hardtanh")},
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "erf", "square")},
    "gelu-tanh": lambda u: F.gelu(u, approximate="tanh"),
    "new-gelu": lambda u: 0.5 * u * (1.0 + torch.tanh(0.8 * (u + 0.044715 * torch.pow(u, 3.0)))),
    "quick-gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "squared-relu": lambda u: F.relu(u).square(),
    "in-place": lambda u: F.relu(u, inplace=True),
    "power-zero": lambda u: F.silu(u) + u**0,
    "clamped": lambda u: u.clamp(-0.5, 0.7) + u.exp().rsqrt(),
    "others": lambda u: torch.maximum(u.abs().sqrt(), 0.1 * u) / (2.0 + u.abs()) - (1 + u.square()).reciprocal(),
}
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda u, v: F.silu(u) * v,
    "gpt-oss": lambda u, v: (v.clamp(-7.0, 7.0) + 1) * (u.clamp(max=7.0) * torch.sigmoid(1.702 * u)),
}


@pytest.mark.parametrize("name", [*PLAIN, *GATED])
def test_any_activation(name: str) -> None:
    torch.manual_seed(0)
    model = Model(Of(PLAIN[name], 1) if name in PLAIN else Of(GATED[name], 2))
    assert_as_dense_in_chunks(model)


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "lora"])
def test_under_autocast_products_are_those_of_the_dense_ffn(adapted: bool) -> None:
    """In bf16, and as far from fp64 as those of the eager model are."""
    model, (x, labels) = model_of(Gated, adapted), batch(41)
    eager, reference = copy.deepcopy(model), copy.deepcopy(model).double()
    want = gradients(reference, reference(x.double(), labels))
    compiled = torch.compile(model, backend=without_inductor(**CHUNKS))
    with torch.autocast("cpu", torch.bfloat16):
        loss, dense = compiled(x, labels), eager(x, labels)
    got, plain = gradients(model, loss), gradients(eager, dense)
    assert chunk_of(compiled) == 13 and {name: g.dtype for name, g in got.items()} == {name: g.dtype for name, g in plain.items()}

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[name] - g).norm() / g.norm()) for name, g in want.items()) / len(want)

    assert error(got) < 1.3 * error(plain)


@pytest.mark.parametrize("where", ["hidden", "adapter"])
def test_what_draws_random_numbers_is_computed_at_once(where: str) -> None:
    model = model_of(Gated, False)
    if where == "hidden":
        model.ffn = Of(lambda u: F.dropout(F.gelu(u), 0.25, True), 1)
    else:
        inject_adapter_in_model(LoraConfig(r=2, lora_dropout=0.1, target_modules=["down"]), model.ffn)
    compiled = torch.compile(model.train(), backend=without_inductor(**CHUNKS))
    compiled(*batch(41)).backward()
    assert chunk_of(compiled) is None


def test_one_compile_serves_all_lengths() -> None:
    model = model_of(Plain, True)
    reference = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=without_inductor(**CHUNKS), dynamic=True)
    for length in (13, 3, 41):
        x, labels = batch(length)
        assert_gradients_close(gradients(model, compiled(x, labels)), gradients(reference, reference(x.double(), labels)))
    assert sptc.report(compiled).graphs == 1 and chunk_of(compiled) == 13


class Adapted(nn.Module):
    """Adapters that share A or B, their scalings numbers that the caller gives."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(D, D) for _ in range(3))
        self.a, self.b = (nn.ModuleList(nn.Linear(*sizes, bias=False) for _ in range(3)) for sizes in ((D, 2), (2, D)))
        self.shared = shared

    def forward(self, x: Tensor, scalings: tuple[float, float, float]) -> Tensor:
        low = self.a[0](x)
        lows = low, low if self.shared == "a" else self.a[1](x)
        gate = self.gate(x) + self.b[0](lows[0]) * scalings[0]
        hidden = F.silu(gate) * (self.up(x) + self.b[1](lows[1]) * scalings[1])
        return self.down(hidden) + self.b[1 if self.shared == "b" else 2](self.a[2](hidden)) * scalings[2]


@pytest.mark.parametrize("shared", ["none", "a", "b"])
def test_adapters_may_share_what_numbers_of_the_graph_scale(shared: str) -> None:
    """No program holds such a number, and an operand is multiplied with one at most: else all tokens are computed at once."""
    torch.manual_seed(0)
    model = Adapted(shared)
    reference = copy.deepcopy(model).double()
    x, _ = batch(41)
    compiled = torch.compile(model, backend=without_inductor(**CHUNKS), dynamic=True)
    for scalings in ((0.3, 1.7, 0.6), (2.5, 0.4, 1.1)):
        got = gradients(model, compiled(x, scalings).square().mean())
        assert_gradients_close(got, gradients(reference, reference(x.double(), scalings).square().mean()))
    assert chunk_of(compiled) == (13 if shared == "none" else None)


def shapes_in(model: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> set[tuple[int, ...]]:
    """Of all values of the forward and the backward graph."""
    found: set[tuple[int, ...]] = set()

    def seen(gm: torch.fx.GraphModule, _: list) -> Callable:
        values = [node.meta.get("val") for node in gm.graph.nodes]
        found.update(tuple(map(int, value.shape)) for value in values if isinstance(value, Tensor))
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=seen, partition_fn=min_cut_rematerialization_partition)
    config = Config.from_options(options)
    compiled = torch.compile(model, backend=lambda gm, i: compile_graph(gm, i, config, inner=lambda g, i, _: backend(g, i)))
    compiled(*inputs).backward()
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_hidden_values_of_all_tokens_are_in_no_graph(checkpointed: bool) -> None:
    model, inputs = model_of(Gated, True), batch(41)
    if checkpointed:
        inner = model.ffn.forward
        model.ffn.forward = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
    assert (82, HIDDEN) in shapes_in(model, inputs, WHOLE)
    assert (82, HIDDEN) not in shapes_in(model, inputs, CHUNKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_takes_the_programs(dtype: torch.dtype) -> None:
    """They are text in the code that it writes."""
    model, (x, labels) = model_of(Gated, True), batch(41)
    reference = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="spt", options=CHUNKS)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = gradients(model, compiled(x, labels))
    assert chunk_of(compiled) == 13
    assert_gradients_close(got, gradients(reference, reference(x.double(), labels)), 1e-5 if dtype == torch.float32 else 5e-2)


class Added(nn.Module):
    """A frozen FFN whose output is added to its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.ffn = nn.Linear(D, D), Gated().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x += self.ffn(x)
        return x.square().sum()


@pytest.mark.parametrize("options", [CHUNKS, {"ffn.selector": "router", "ffn.density": 1.0, "decline": "never"}], ids=["chunks", "router"])
def test_input_may_be_written_to_behind_it(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Added(), torch.randn(41, D)
    reference = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=without_inductor(**options))
    got = gradients(model, compiled(x))
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]
    assert_gradients_close(got, gradients(reference, reference(x.double())))
