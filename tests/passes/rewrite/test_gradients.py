"""An FFN whose gradients go through a part of its hidden units: loss as the dense one, every gradient as of a plain definition in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import sptc
from sptc.backend import compile_graph
from sptc.codegen.ops.units import sample_tokens
from sptc.config import Config
from tests.models.compiled import assert_gradients_close, gradients, without_inductor
from tests.passes.ffns import HIDDEN, D, Fused, Gated, Model, Plain, batch, hidden_and_output, model_of

EXACT = {"max_rise": 0.0, "decline": "never", "ffn.padding": "compute"}  # the forward pass, of all tokens
ALIKE = {**EXACT, "ffn.gradient_density": 0.3, "ffn.gradient_context_density": None}
APART = {**EXACT, "ffn.gradient_density": 0.75, "ffn.gradient_context_density": 0.25}


def through_units(ffn: nn.Module, x: Tensor, mask: Tensor | None, units: int) -> Tensor:
    """`ffn(x)`, whose gradients go through the `units` hidden units of the greatest energy over x[mask] alone.

    The B of the down projection's adapter takes part in no unit: its gradient is the dense one.
    """
    hidden, down = hidden_and_output(ffn, x)
    base = getattr(down, "base_layer", down)
    with torch.no_grad():
        columns = base.weight.square().sum(1 if isinstance(base, Conv1D) else 0)
        energy = hidden[sample_tokens(x, mask)].square().sum(0) * columns
        kept = torch.zeros(HIDDEN, dtype=torch.bool).index_fill(0, energy.topk(units).indices, True)
    hidden = torch.where(kept, hidden, hidden.detach())

    def cut(weight: Tensor) -> Tensor:
        return torch.where(kept, weight, weight.detach())

    weight = cut(base.weight.T if isinstance(base, Conv1D) else base.weight)
    y = F.linear(hidden, weight, base.bias)
    if isinstance(down, LoraLinear):
        low = F.linear(hidden, cut(down.lora_A["default"].weight))
        y = y + down.scaling["default"] * down.lora_B["default"](low)
    return y


def expected_loss(model: Model, x: Tensor, labels: Tensor, *, apart: bool) -> Tensor:
    h = model.first(x.double()).flatten(0, 1)
    mask = (labels != -100).flatten()
    if apart:
        y = torch.where(mask[:, None], through_units(model.ffn, h, mask, 24), through_units(model.ffn, h, ~mask, 8))
    else:
        y = through_units(model.ffn, h, None, 10)
    return F.cross_entropy(model.head(h + y), labels.flatten())


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "lora"])
@pytest.mark.parametrize("apart", [False, True], ids=["alike", "apart"])
@pytest.mark.parametrize("ffn", [Gated, Fused, Plain])
def test_gradients_and_loss(ffn: Callable[[], nn.Module], apart: bool, adapted: bool) -> None:
    model = model_of(ffn, adapted)
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    compiled = torch.compile(model, backend=without_inductor(**(APART if apart else ALIKE)))
    got = gradients(model, loss := compiled(x, labels))
    (region,) = [r for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert region.status == "rewritten" and region.density == 1.0
    assert region.settings == {
        "hidden": HIDDEN,
        "units": 24 if apart else 10,
        "context": 8 if apart else None,
        "gradients_only": True,
        "recompute": False,
        "chunk": None,
        "rows": "all",
        "rank": 0,
    }

    torch.testing.assert_close(loss.double(), reference(x.double(), labels), rtol=1e-5, atol=0)
    assert_gradients_close(got, gradients(reference, expected_loss(reference, x, labels, apart=apart)))


@pytest.mark.parametrize("options", [ALIKE, APART], ids=["alike", "apart"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_thin_products_again(reentrant: bool, options: dict) -> None:
    """Backward under a checkpoint runs no product of all tokens with all units: the dense values are not needed there."""
    model = model_of(Gated, True)
    reference = copy.deepcopy(model)
    inner = model.ffn.forward
    model.ffn.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    shapes: list[list[str]] = []

    def counting(gm: torch.fx.GraphModule, _: list) -> Callable:
        values = [node.meta["val"] for node in gm.graph.nodes if "mm" in str(node.target)]
        shapes.append([str(tuple(value.shape)) for value in values])  # sizes that are data compare with nothing
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=counting, partition_fn=min_cut_rematerialization_partition)
    x, labels = batch()
    config = Config.from_options(options)
    compiled = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, config, inner=lambda g, i, _: backend(g, i)))
    got = gradients(model, compiled(x, labels))
    forward, backward = shapes
    whole = str((x.shape[0] * x.shape[1], HIDDEN))
    assert forward.count(whole) == 4 and whole not in backward
    plain = torch.compile(reference, backend=without_inductor(**options))
    assert_gradients_close(got, gradients(reference, plain(x, labels)))


def test_hidden_values_are_kept_of_the_chosen_units_alone() -> None:
    model = model_of(Gated, True)
    kept: list[list[str]] = []

    def counting(gm: torch.fx.GraphModule, _: list) -> Callable:
        (output,) = gm.graph.find_nodes(op="output")
        kept.append([str(tuple(a.meta["val"].shape)) for a in output.args[0] if hasattr(a, "meta") and hasattr(a.meta["val"], "shape")])
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=counting, partition_fn=min_cut_rematerialization_partition)
    x, labels = batch()
    for options in (ALIKE, APART):
        torch._dynamo.reset()
        config = Config.from_options(options)
        compiled = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, config, inner=lambda g, i, _: backend(g, i)))  # noqa: B023
        compiled(x, labels).backward()
        forward = kept[0]
        kept.clear()
        assert str((x.shape[0] * x.shape[1], HIDDEN)) not in forward


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.gelu(self.up(x)), 0.5, self.training))


def test_what_dropout_drew_forward_holds_backward() -> None:
    """A unit whose value dropout set to zero gets no gradient: the mask is one and the same."""
    model = model_of(Dropped, False)
    x, labels = batch()
    compiled = torch.compile(
        model, backend=without_inductor(**EXACT, **{"ffn.gradient_density": 0.97, "ffn.gradient_context_density": None})
    )
    x = x[:1, :1]
    got = gradients(model, compiled(x, labels.clamp(min=0)[:1, :1]))
    assert any(r.status == "rewritten" for r in sptc.report(compiled).regions)
    # With a single token, a column of the down weight has a gradient where its unit's value is not 0, and a row of the up weight likewise.
    rows, columns = got["ffn.up.weight"].abs().sum(1) > 0, got["ffn.down.weight"].abs().sum(0) > 0
    assert rows.equal(columns) and 0 < int(rows.sum()) < HIDDEN - 2


def test_full_density_is_left_dense() -> None:
    compiled = torch.compile(
        model_of(Gated, True), backend=without_inductor(**EXACT, **{"ffn.gradient_density": 1.0, "ffn.gradient_context_density": None})
    )
    compiled(*batch()).backward()
    (region,) = [r for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert region.status == "declined"
