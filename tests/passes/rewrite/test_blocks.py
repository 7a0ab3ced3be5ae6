"""A routed FFN: its output and every gradient are those of a plain definition, in fp64."""

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
from torch._inductor.decomposition import select_decomp_table
from transformers.pytorch_utils import Conv1D

import sptc
from sptc.backend import compile_graph
from sptc.codegen.reference.route import budgets
from sptc.config import Config
from tests.models.compiled import assert_gradients_close, gradients, without_inductor
from tests.passes.ffns import HIDDEN, D, Fused, Gated, Model, Plain, batch, hidden_and_output, model_of

BLOCKS, ACTIVE = 8, 3
OPTIONS = {"decline": "never", "ffn.selector": "router", "ffn.blocks": BLOCKS, "ffn.density": ACTIVE / BLOCKS}
FFNS = pytest.mark.parametrize("ffn", [Gated, Fused, Plain])
ADAPTED = pytest.mark.parametrize("adapted", [False, True], ids=["trained", "lora"])


def prepared(ffn: Callable[[], nn.Module], adapted: bool) -> Model:
    """With state that is no longer what it started from."""
    model = model_of(ffn, adapted)
    sptc.prepare(model, batch(), OPTIONS)
    with torch.no_grad():
        for name, p in model.ffn.named_parameters():
            if "spt" in name:
                p.requires_grad_().add_(0.5 * torch.randn_like(p))
    return model


def best_blocks(scores: Tensor, shares: list[int]) -> Tensor:
    """1.0 for the `shares[t]` best blocks of token t, else 0.0; [N, BLOCKS]."""
    active = torch.zeros_like(scores)
    for t, best in enumerate(scores.argsort(1, descending=True)):
        active[t, best[: shares[t]]] = 1.0
    return active


def over_blocks(ffn: nn.Module, x: Tensor, active: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """`ffn(x)`, each token over its blocks, these scaled; what the adapter of `down` has of them is divided by their share."""
    hidden, down = hidden_and_output(ffn, x)
    hidden = hidden * (active * scale).repeat_interleave(HIDDEN // BLOCKS, 1)
    if not isinstance(down, LoraLinear):
        return down(hidden)
    low = down.lora_A["default"](hidden) * down.scaling["default"] / active.mean(1, keepdim=True)
    return down.base_layer(hidden) + down.lora_B["default"](low)


def trained(ffn: nn.Module, x: Tensor, shares: list[int]) -> Tensor:
    """As docs/design/state.md has it."""
    s = ffn.spt.slots()["ffn0"]
    added = F.linear(x, s.weight, s.bias)
    active = best_blocks(F.linear(x, s.start_weight, s.start_bias) + added, shares)
    y = over_blocks(ffn, x, active, 2 * torch.sigmoid(added))
    return y + 2 * (1 - active.mean(1, keepdim=True)) * F.linear(F.linear(x, s.low), s.high, s.constant)


def by_weights(ffn: nn.Module, x: Tensor) -> Tensor:
    """Without state a block is chosen by the mean of its rows of the first up projection, the one that a function is applied to."""
    layer = {Gated: "gate", Fused: "both", Plain: "up"}[type(ffn)]
    base = getattr(getattr(ffn, layer), "base_layer", getattr(ffn, layer))
    weight = (base.weight.t() if isinstance(base, Conv1D) else base.weight)[-HIDDEN:].detach()
    return best_blocks(F.linear(x.detach(), weight.unflatten(0, (BLOCKS, -1)).mean(1)), [ACTIVE] * len(x))


def check(model: Model, expected: Callable[[nn.Module, Tensor], Tensor], **options: object) -> None:
    """Loss and every gradient against those of `expected(ffn, x)` in fp64."""
    reference = copy.deepcopy(model).double()
    x, labels = batch()
    compiled = torch.compile(model, backend=without_inductor(**{**OPTIONS, **options}))
    got = gradients(model, loss := compiled(x, labels))
    assert {r.kind: r.status for r in sptc.report(compiled).regions}["ffn"] == "rewritten"
    h = reference.first(x.double()).flatten(0, 1)
    dense = F.cross_entropy(reference.head(h + expected(reference.ffn, h)), labels.flatten())
    torch.testing.assert_close(loss.double(), dense, rtol=1e-5, atol=0)
    assert_gradients_close(got, gradients(reference, dense))


@pytest.mark.parametrize("keep", ["loss", None])
@ADAPTED
@FFNS
def test_a_prepared_ffn_equals_its_definition(ffn: Callable[[], nn.Module], adapted: bool, keep: str | None) -> None:
    counts = (batch()[1] != -100).flatten().tolist()
    shares = budgets(counts, BLOCKS, ACTIVE) if keep else [ACTIVE] * len(counts)
    assert (min(shares) < ACTIVE < max(shares)) == bool(keep)
    model = prepared(ffn, adapted)
    assert {"ffn.spt.ffn0.weight", "ffn.spt.ffn0.low"} <= {name for name, p in model.named_parameters() if p.requires_grad}
    check(model, lambda f, x: trained(f, x, shares), **{"ffn.keep": keep})


@ADAPTED
@FFNS
def test_without_state_blocks_are_chosen_by_weights(ffn: Callable[[], nn.Module], adapted: bool) -> None:
    check(model_of(ffn, adapted), lambda f, x: over_blocks(f, x, by_weights(f, x)), **{"ffn.keep": None})


@pytest.mark.parametrize("adapted, state", [(False, False), (True, True)], ids=["trained", "lora-prepared"])
@FFNS
def test_at_density_one_it_is_dense(ffn: Callable[[], nn.Module], adapted: bool, state: bool) -> None:
    model = prepared(ffn, adapted) if state else model_of(ffn, adapted)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "spt" not in name)  # nothing of it has a say
    check(model, lambda f, x: f(x[None])[0], **{"ffn.density": 1.0})


class Dropped(nn.Module):
    """The up projection is the identity of what is positive, so that a hidden unit is 0 where dropout made it so."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        for layer in (self.up, self.down):
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.dropout(F.relu(self.up(x)), 0.25, True))


def test_dropout_of_a_block_is_a_units_own() -> None:
    torch.manual_seed(0)
    x = torch.rand(500, HIDDEN) + 0.5
    compiled = torch.compile(Dropped(), backend=without_inductor(**OPTIONS))
    y = compiled(x).detach().unflatten(1, (BLOCKS, -1))
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]
    used = (y != 0).any(2)
    kept = (y != 0)[used].float()
    torch.testing.assert_close(y[y != 0], (x.unflatten(1, (BLOCKS, -1)) / 0.75)[y != 0])
    assert used.sum() == pytest.approx(500 * ACTIVE, rel=0.02), "all four units of a block are rarely dropped"
    assert kept.mean() == pytest.approx(0.75, abs=0.03)


@FFNS
def test_under_autocast_products_are_in_its_dtype(ffn: Callable[[], nn.Module]) -> None:
    model = prepared(ffn, True)
    reference = copy.deepcopy(model)
    ran: list[torch.dtype] = []

    def recording(gm: torch.fx.GraphModule, _: list) -> Callable[..., object]:
        products = (torch.ops.sptc.gather_product.default, torch.ops.sptc.scatter_product.default, torch.ops.sptc.outer_product.default)
        ran.extend(node.meta["val"].dtype for node in gm.graph.nodes if node.target in products)
        return make_boxed_func(gm.forward)

    backend, options = aot_autograd(fw_compiler=recording), Config.from_options(OPTIONS)
    compiled = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, options, inner=lambda g, i, _: backend(g, i)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(*batch())
    got = gradients(model, loss)
    assert set(ran) == {torch.bfloat16} and len(ran) > 8, "backward's too"
    plain = torch.compile(reference, backend=without_inductor(**OPTIONS))
    want = gradients(reference, exact := plain(*batch()))
    torch.testing.assert_close(loss.float(), exact, rtol=0.02, atol=0)
    assert_gradients_close(got, want, 0.1)


def test_backward_keeps_what_the_projections_give_and_no_copies_of_rows() -> None:
    kept: list[tuple[int, ...]] = []

    def forward(gm: torch.fx.GraphModule, _: list) -> Callable[..., object]:
        (output,) = gm.graph.find_nodes(op="output")
        kept.extend(tuple(node.meta["val"].shape) for node in output.args[0] if isinstance(node.meta.get("val"), Tensor))
        return make_boxed_func(gm.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda gm, _: make_boxed_func(gm.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    model, options = prepared(Gated, True), Config.from_options(OPTIONS)
    compiled = torch.compile(model, backend=lambda gm, inputs: compile_graph(gm, inputs, options, inner=lambda g, i, _: backend(g, i)))
    compiled(*batch(41)).backward()
    entries, width = 82 * ACTIVE, HIDDEN // BLOCKS
    of_entries = [shape for shape in kept if len(shape) == 2 and shape[0] == entries and shape[1] > 1]
    assert of_entries == [(entries, width)] * 2, "the outputs of gate and up"


def test_a_prepared_ffn_begins_near_the_dense_one() -> None:
    """Scales start at 1, and what is left out is stood in for: nearer than its blocks alone, on the batch that it was prepared with."""
    model = model_of(Gated, False)
    x = torch.randn(64, 7, D)
    sptc.prepare(model, (x, torch.zeros(64, 7, dtype=torch.int64)), OPTIONS)
    h = model.first(x).flatten(0, 1)
    shares = [ACTIVE] * len(h)
    state = model.ffn.spt.slots()["ffn0"]
    assert not state.weight.any() and not state.bias.any()
    with torch.no_grad():
        dense = model.ffn(h)
        error = (trained(model.ffn, h, shares) - dense).norm()
        state.high.zero_()
        state.constant.zero_()
        assert error < 0.9 * (trained(model.ffn, h, shares) - dense).norm()


def test_one_compile_serves_all_lengths() -> None:
    model = model_of(Gated, True)
    compiled = torch.compile(model, backend=without_inductor(**OPTIONS, **{"ffn.keep": None}), dynamic=True)
    for length in (13, 17, 23):
        x, labels = batch(length)
        reference = copy.deepcopy(model).double()
        got = gradients(model, compiled(x, labels))
        h = reference.first(x.double()).flatten(0, 1)
        dense = F.cross_entropy(reference.head(h + over_blocks(reference.ffn, h, by_weights(reference.ffn, h))), labels.flatten())
        assert_gradients_close(got, gradients(reference, dense))
    assert sptc.report(compiled).graphs == 1
