"""An FFN over fewer hidden units: its output and every gradient are those of a plain definition, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental import symbolic_shapes
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import sptc
from sptc.backend import compile_graph
from sptc.codegen.ops.units import fit_linear, sample_tokens
from sptc.config import Config
from tests.models.compiled import assert_gradients_close, gradients, without_inductor
from tests.passes.ffns import CLASSES, HIDDEN, D, Fused, Gated, Model, Plain, batch, hidden_and_output, model_of

ALL = {"decline": "never", "ffn.padding": "compute"}  # of the tokens, whatever reads them
FORWARD_TOO = {"gradients_only": False, "rows": "all", "recompute": False, "chunk": None}
RANK = {"linear": -(-D // 4), "nothing": 0}  # of what stands in for units that are left out


def over_units(ffn: nn.Module, x: Tensor, mask: Tensor | None, units: int, of: Tensor, left_out: str = "nothing") -> Tensor:
    """`ffn(of)`, the hidden units that are not among the `units` of the greatest energy over x[mask] set to 0, or what they give to a
    linear map of `of`."""
    sample = sample_tokens(x, mask)
    with torch.no_grad():
        hidden, down = hidden_and_output(ffn, x[sample])
        base = getattr(down, "base_layer", down)
        columns = base.weight.square().sum(1 if isinstance(base, Conv1D) else 0)
        energy = hidden.square().sum(0) * columns
        kept = torch.zeros(HIDDEN, dtype=of.dtype).index_fill(0, energy.topk(units).indices, 1.0)
        a, b = fit_linear(x[sample], down(hidden * (1 - kept)) - down(torch.zeros_like(hidden)), -(-D // 4))
    hidden, down = hidden_and_output(ffn, of)
    return down(hidden * kept) + (of @ a.t() @ b.t() if left_out == "linear" else 0.0)


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "lora"])
@pytest.mark.parametrize("ffn", [Gated, Fused, Plain])
@pytest.mark.parametrize("left_out", ["linear", "nothing"])
def test_all_tokens_alike(ffn: Callable[[], nn.Module], adapted: bool, left_out: str) -> None:
    model = model_of(ffn, adapted)
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    compiled = torch.compile(model, backend=without_inductor(**{"ffn.density": 0.3, "ffn.left_out": left_out, **ALL}))
    got = gradients(model, loss := compiled(x, labels))
    (region,) = [r for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert region.status == "rewritten" and region.settings == {
        "hidden": HIDDEN,
        "units": 10,
        "context": None,
        **FORWARD_TOO,
        "rank": RANK[left_out],
    }

    h = reference.first(x.double()).flatten(0, 1)
    expected = F.cross_entropy(reference.head(h + over_units(reference.ffn, h, None, 10, h, left_out)), labels.flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_gradients_close(got, gradients(reference, expected))


@pytest.mark.parametrize("counted", ["some", "none", "all"])
@pytest.mark.parametrize("ffn", [Gated, Fused, Plain])
@pytest.mark.parametrize("left_out", ["linear", "nothing"])
def test_tokens_that_count_keep_more_units(ffn: Callable[[], nn.Module], counted: str, left_out: str) -> None:
    model = model_of(ffn, True)
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    if counted != "some":
        labels = torch.full_like(labels, -100) if counted == "none" else labels.clamp(min=0)
    compiled = torch.compile(
        model, backend=without_inductor(**{"ffn.density": 0.75, "ffn.context_density": 0.25, "ffn.left_out": left_out, **ALL})
    )
    loss = compiled(x, labels)
    # Where next to all tokens of the first batch count, they are all alike.
    context = None if counted == "all" else 8
    assert sptc.report(compiled).regions[0].settings == {
        "hidden": HIDDEN,
        "units": 24,
        "context": context,
        **FORWARD_TOO,
        "rank": RANK[left_out],
    }

    h = reference.first(x.double()).flatten(0, 1)
    mask = (labels != -100).flatten()
    of = ((mask, 24), (~mask, 8)) if counted != "all" else ((None, 24),) * 2
    y = torch.where(mask[:, None], *(over_units(reference.ffn, h, rows, units, h, left_out) for rows, units in of))
    expected = F.cross_entropy(reference.head(h + y), labels.flatten())
    if counted == "none":
        assert loss.isnan() and expected.isnan()
        return
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_gradients_close(gradients(model, loss), gradients(reference, expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_no_choice_twice(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else in its body runs again in backward: the products on the chosen units do."""
    model = model_of(Gated, True)
    reference = copy.deepcopy(model)
    inner = model.ffn.forward
    model.ffn.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    ran: list[str] = []

    def counting(gm: torch.fx.GraphModule, _: list) -> Callable:
        ran.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=counting, partition_fn=min_cut_rematerialization_partition)
    x, labels = batch()
    given = {**ALL, "ffn.density": 0.75, "ffn.context_density": 0.25, "ffn.left_out": "linear"}
    options = Config.from_options(given)
    compiled = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, options, inner=lambda g, i, _: backend(g, i)))
    got = gradients(model, compiled(x, labels))
    assert ran.count("sptc.choose_units.default") == ran.count("sptc.fit_linear.default") == 2
    plain = torch.compile(reference, backend=without_inductor(**given))
    assert_gradients_close(got, gradients(reference, plain(x, labels)))


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "lora"])
@pytest.mark.parametrize("ffn", [Gated, Fused, Plain])
@pytest.mark.parametrize("context", [{"ffn.context_density": 1.0}, {}], ids=["apart", "all"])
def test_at_density_one_it_is_dense(context: dict[str, float], ffn: Callable[[], nn.Module], adapted: bool) -> None:
    model = model_of(ffn, adapted)
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    options = {"ffn.density": 1.0, **context, **ALL}
    compiled = torch.compile(model, backend=without_inductor(**options))
    got = gradients(model, compiled(x, labels))
    assert {r.kind: r.status for r in sptc.report(compiled).regions} == {"ffn": "rewritten", "loss": "rewritten"}
    (region,) = [r for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert region.density == 1.0 and region.settings["context"] == (HIDDEN if context else None)
    assert_gradients_close(got, gradients(reference, reference(x.double(), labels)))


def test_adapters_of_rank_one() -> None:
    """Rows whose count is data, of one number each: autograd asks a matrix of one column whether it has one row."""
    model = model_of(Gated, adapted=True, rank=1)
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    compiled = torch.compile(model, backend=without_inductor(**{"decline": "never", "ffn.density": 1.0, "ffn.context_density": None}))
    got = gradients(model, compiled(x, labels))
    (region,) = [r for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert region.status == "rewritten" and region.settings["rows"] == "counted"
    assert_gradients_close(got, gradients(reference, reference(x.double(), labels)))


def test_one_hidden_unit_is_left_to_the_context() -> None:
    model = model_of(Gated, adapted=False)
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    options = {"ffn.density": 1.0, "ffn.context_density": 1 / HIDDEN, **ALL}
    compiled = torch.compile(model, backend=without_inductor(**options))
    got = gradients(model, loss := compiled(x, labels))
    (region,) = [r for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert region.status == "rewritten" and region.settings["context"] == 1
    expected = reference(x.double(), labels)  # no token reads another one, and the context has no loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_gradients_close(got, gradients(reference, expected))


class Cast(nn.Module):
    """The activation is computed in fp32, the products in the dtype of the weights."""

    def __init__(self, product: Callable[[Tensor, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.product = nn.Linear(D, HIDDEN, bias=False), nn.Linear(HIDDEN, D, bias=False), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(F.gelu(self.product(x, self.up).float()).to(x.dtype), self.down)


@pytest.mark.parametrize("product", [lambda x, layer: layer(x), lambda x, layer: x @ layer.weight.t()], ids=["linear", "matmul"])
def test_casts_around_the_activation(product: Callable[[Tensor, nn.Linear], Tensor]) -> None:
    torch.manual_seed(0)
    ffn, x = Cast(product).bfloat16(), torch.randn(2, 7, D).bfloat16()
    compiled = torch.compile(ffn, backend=without_inductor(**{"ffn.density": 1.0, **ALL}))
    got = gradients(ffn, (y := compiled(x)).square().sum())
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]
    torch.testing.assert_close(y, ffn(x))
    assert_gradients_close(got, gradients(ffn, ffn(x).square().sum()), 1e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_in_another_shape_than_those_of_the_input(dynamic: bool) -> None:
    """Some views between the projections, and no dimension of tokens at all."""
    up, down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
    for x, inside in ((torch.randn(2, 7, D), (7, 2, HIDDEN)), (torch.randn(D), (HIDDEN,))):
        torch._dynamo.reset()

        def ffn(x: Tensor, inside: tuple[int, ...] = inside) -> Tensor:
            return down(F.gelu(up(x)).reshape(inside))

        compiled = torch.compile(ffn, backend=without_inductor(**{"ffn.density": 1.0, **ALL}), dynamic=dynamic)
        torch.testing.assert_close(compiled(x), ffn(x))
        assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]


class Padded(nn.Module):
    """Attention that hides padding, so that the graph tells which tokens are none."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.head = Gated(), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        q = x[:, None]
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=attention_mask[:, None, None, :].bool())[:, 0]
        return F.cross_entropy(self.head(y + self.ffn(y)).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("left_out", ["linear", "nothing"])
@pytest.mark.parametrize("context", [None, 0.25])
def test_padding_has_no_say(context: float | None, left_out: str) -> None:
    torch.manual_seed(0)
    model = Padded()
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    padding = torch.ones(2, 7, dtype=torch.int64)
    padding[0, 4:] = 0
    x = torch.where(padding[..., None] == 1, x, 100 * x)
    labels = labels.masked_fill(padding == 0, -100)
    options = {"ffn.density": 0.5, "ffn.context_density": context, "ffn.left_out": left_out, **ALL, "attention.enabled": False}
    compiled = torch.compile(model, backend=without_inductor(**options))
    got = gradients(model, loss := compiled(x, labels, padding))

    q = x.double()[:, None]
    y = F.scaled_dot_product_attention(q, q, q, attn_mask=padding[:, None, None, :].bool())[:, 0].flatten(0, 1)
    counted, real = (labels != -100).flatten(), padding.flatten() == 1
    if context is None:
        out = over_units(reference.ffn, y, real, 16, y, left_out)
    else:
        parts = (over_units(reference.ffn, y, rows, units, y, left_out) for rows, units in ((counted, 16), (~counted & real, 8)))
        out = torch.where(counted[:, None], *parts)
    expected = F.cross_entropy(reference.head(y + out), labels.flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_gradients_close(got, gradients(reference, expected))


def kept_for_backward(model: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Shapes of what the forward graph gives the backward one, partitioned as Inductor does it."""
    kept: list[tuple[Any, ...]] = []

    def forward(gm: torch.fx.GraphModule, _: list) -> Callable:
        (output,) = gm.graph.find_nodes(op="output")
        values = [node.meta.get("val") for node in output.args[0]]
        kept.extend(tuple(n if isinstance(n, int) else str(n) for n in value.shape) for value in values if isinstance(value, Tensor))
        return make_boxed_func(gm.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda gm, _: make_boxed_func(gm.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    given = Config.from_options({**ALL, **options})
    torch.compile(model, backend=lambda gm, i: compile_graph(gm, i, given, inner=lambda g, i, _: backend(g, i)))(*inputs).backward()
    torch._dynamo.reset()
    return kept


def test_backward_keeps_what_the_projections_give_and_no_copies_of_weights() -> None:
    kept = kept_for_backward(model_of(Gated, True), batch(41), {"ffn.density": 0.75, "ffn.context_density": None})
    units = [shape for shape in kept if 24 in shape]
    assert units == [(24,), (82, 24), (82, 24)], "which units, and the outputs of gate and up on them"


RECOMPUTED: dict[str, dict[str, Any]] = {
    "whole": {"max_rise": 0.0},
    "units": {"ffn.density": 0.75, "ffn.context_density": None},
    "apart": {"ffn.density": 1.0, "ffn.context_density": 0.25},
    "gradients": {"max_rise": 0.0, "ffn.gradient_density": 0.75},
}


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "lora"])
@pytest.mark.parametrize("ffn", [Gated, Fused, Plain])
@pytest.mark.parametrize("form", RECOMPUTED)
def test_recompute_keeps_no_hidden_values_and_changes_nothing(form: str, ffn: Callable[[], nn.Module], adapted: bool) -> None:
    if form == "apart" and not hasattr(symbolic_shapes, "optimization_hint"):
        pytest.skip("this torch's partitioner ignores hints of sizes that only data will tell, and keeps what has such a size")
    model, inputs, options = model_of(ffn, adapted), batch(41), RECOMPUTED[form]
    reference = copy.deepcopy(model)
    weights = {size for p in model.parameters() for size in (tuple(p.shape), tuple(p.shape)[::-1])}

    def hidden(**more: Any) -> list[tuple[Any, ...]]:
        kept = kept_for_backward(model, inputs, {**options, **more})
        return [shape for shape in kept if len(shape) > 1 and shape[-1] in (8, 16, 24, 48, 32, 64) and shape not in weights]

    assert hidden() and not hidden(**{"ffn.recompute": True})
    model.zero_grad()
    compiled = torch.compile(model, backend=without_inductor(**{**ALL, **options, "ffn.recompute": True, "decline": "auto"}))
    got = gradients(model, loss := compiled(*inputs))
    (region,) = [r for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert region.status == "rewritten" and region.settings is not None and region.settings["recompute"]
    assert region.kept_after is not None and region.kept_before is not None and region.kept_after < region.kept_before
    torch._dynamo.reset()
    expected = torch.compile(reference, backend=without_inductor(**{**ALL, **options}))(*inputs)
    torch.testing.assert_close(loss, expected)
    assert_gradients_close(got, gradients(reference, expected))


class Flattened(Model):
    """The loss's target is computed by sizes of its inputs."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x, n = self.first(x), labels.shape[0] * labels.shape[1]
        return F.cross_entropy(self.head(x + self.ffn(x)).reshape(n, CLASSES), labels.reshape(n))


def test_one_compile_serves_all_lengths_and_counts() -> None:
    torch.manual_seed(0)
    model = Flattened(Gated())
    options = {"ffn.density": 1.0, "ffn.context_density": 0.25, **ALL}
    compiled = torch.compile(model, backend=without_inductor(**options), dynamic=True)
    for length in (13, 17, 23):
        x, labels = batch(length)
        reference = copy.deepcopy(model).double()
        got = gradients(model, compiled(x, labels))
        h, mask = reference.first(x.double()).flatten(0, 1), (labels != -100).flatten()
        y = torch.where(mask[:, None], reference.ffn(h), over_units(reference.ffn, h, ~mask, 8, h))
        assert_gradients_close(got, gradients(reference, F.cross_entropy(reference.head(h + y), labels.flatten())))
    assert sptc.report(compiled).graphs == 1


class Written(nn.Module):
    """A part of what the hidden values are computed from is an input of the graph that it changes in place, as a frozen weight may be."""

    def __init__(self, written: str, before: bool) -> None:
        super().__init__()
        self.up, self.down, self.written, self.before = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D), written, before
        self.up.requires_grad_(False)

    def write(self, x: Tensor) -> None:
        with torch.no_grad():
            {"x": x, "weight": self.up.weight, "bias": self.up.bias, "data": self.up.weight.data, "part": x[:, 0]}[self.written].mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            self.write(x)
        y: Tensor = self.down(F.gelu(self.up(x)))
        if not self.before:
            self.write(x)
        return y


@pytest.mark.parametrize("options", [{"ffn.recompute": True}, {"objective": "memory"}], ids=["recompute", "memory"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("written", ["x", "weight", "bias", "data", "part"])
def test_what_is_written_is_not_read_again_in_backward(written: str, before: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Written(written, before).double()
    reference, x = copy.deepcopy(model), torch.randn(2, 9, D, dtype=torch.float64)
    config = Config.from_options({**ALL, **options, "ffn.density": 1.0})

    def partitioned(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_graph(gm, inputs, config, inner=lambda g, given, _: aot_eager(g, given))

    compiled = torch.compile(model, backend=partitioned)
    got, want = (gradients(m, call(x.clone()).sum()) for m, call in ((model, compiled), (reference, reference)))
    assert_gradients_close(got, want)
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]
