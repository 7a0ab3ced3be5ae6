"""Rewriting leaves nothing of the dense attention behind, inside checkpoints too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sptc
from sptc.codegen.cpu.attention import default_blocks
from sptc.config import Config
from sptc.device.costs import calibrate
from sptc.passes import PIPELINE
from sptc.passes.graph.frame import graphs
from sptc.passes.graph.pattern import same_size, shape
from sptc.passes.runner import run
from sptc.passes.unit import Unit
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.models.zoo import CASES, LENGTH


def rewritten(model, inputs) -> list[Unit]:
    import sptc.codegen.ops  # noqa: F401  registers the operators

    units: list[Unit] = []

    def backend(gm, example_inputs):
        unit = Unit(gm, tuple(example_inputs), Config.from_options({"decline": "never"}), calibrate(torch.device("cpu"), default_blocks))
        units.append(run(unit, PIPELINE))
        return units[-1].gm.forward

    torch.compile(model, backend=backend)(**inputs)
    return units


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["llama-sdpa-padded", "llama-eager-padded"])
def test_no_square_mask_is_left(name, checkpointed):
    model, inputs = CASES[name].make()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (unit,) = rewritten(model, inputs)
    every = graphs(unit.gm)
    assert len(every) == (3 if checkpointed else 1)
    nodes = [node for gm in every for node in gm.graph.nodes]
    assert sum("sptc.sparse_attention.default" in str(node.target) for node in nodes) == 2
    sizes = [shape(node)[-2:] for node in nodes]
    assert not any(len(pair) == 2 and all(same_size(size, LENGTH) for size in pair) for pair in sizes)


@pytest.mark.parametrize("name", ["llama-eager-padded", "mistral-sdpa-packed"])
def test_gradients_inside_checkpoints(name):
    model, inputs = CASES[name].make()
    want = gradients(model, CASES[name].loss(model(**inputs)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(model, CASES[name].loss(torch.compile(model, backend=without_inductor(**FULL))(**inputs)))
    assert_gradients_close(got, want)


class Viewed(torch.nn.Module):
    """Fused attention whose heads are put together by a `contiguous` that changes nothing, which Dynamo leaves out, and a view."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.permute(0, 2, 1, 3).contiguous().view(b, n, 16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_relies_on_the_layout_of_fused_attention_still_finds_it(dynamic):
    torch.manual_seed(0)
    model = Viewed()
    compiled = torch.compile(model, backend=without_inductor(**FULL), dynamic=dynamic)
    for n in (11, 7):
        x = torch.randn(2, n, 16)
        want = gradients(model, model(x).square().sum())
        assert_gradients_close(gradients(model, compiled(x).square().sum()), want)


class Biased(nn.Module):
    """Attention inside a checkpoint, with a bias from outside that does not read as a predicate."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection, self.make = nn.Linear(16, 16), make

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return checkpoint(self.attend, x, self.make(bias), use_reentrant=False)

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        q = self.projection(x).view(*x.shape[:2], 2, 8).transpose(1, 2)
        return (torch.softmax(0.3 * q @ q.transpose(-1, -2) + bias, -1) @ q).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("make", [lambda b: b, lambda b: b.sin().to(torch.float32), lambda b: b.masked_fill(b > 1, -torch.inf)])
def test_a_bias_from_outside_a_checkpoint(make):
    model, x, bias = Biased(make), torch.randn(2, 12, 16), torch.randn(1, 1, 12, 12)
    want = gradients(model, model(x, bias).square().sum())
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    assert_gradients_close(gradients(model, compiled(x, bias).square().sum()), want)
    (region,) = sptc.report(compiled).regions
    assert region.status == "rewritten"


class Merged(nn.Module):
    """Attention over [b * h, n, m] scores, to which `baddbmm` adds a bias of that layout, and a causal mask after it."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.beta = nn.Linear(16, 48), beta

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 2, 8).transpose(1, 2).reshape(b * 2, n, 8) for t in self.qkv(x).chunk(3, -1))
        scores = bias.sin().baddbmm(q, k.transpose(-1, -2), beta=self.beta, alpha=0.3).view(b, 2, n, n)
        weights = (scores + torch.full((n, n), -torch.inf).triu(1)).softmax(-1).view(b * 2, n, n)
        return torch.bmm(weights, v).view(b, 2, n, 8).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("lead", [(6, 1), (6, 0), (1, 0), (0,)], ids=str)  # 0: as many as keys
def test_a_bias_with_batch_and_heads_in_one_dimension(lead, dynamic):
    model = Merged()
    compiled = torch.compile(model, backend=without_inductor(**FULL), dynamic=dynamic)
    for n in (11, 14):
        x, bias = torch.randn(3, n, 16), torch.randn(*(size or n for size in lead), n)
        want = gradients(model, model(x, bias).square().sum())
        assert_gradients_close(gradients(model, compiled(x, bias).square().sum()), want)
    assert all(region.status == "rewritten" for region in sptc.report(compiled).regions)


@pytest.mark.parametrize(("beta", "sizes", "rule"), [(2.0, (6, 1, 11), "scale"), (1.0, (6, 11, 1), "mask"), (1.0, (6, 1, 1), "mask")])
def test_other_biases_of_merged_scores_are_refused(beta, sizes, rule):
    compiled = torch.compile(Merged(beta), backend=without_inductor(**FULL))
    compiled(torch.randn(3, 11, 16), torch.randn(sizes)).sum().backward()
    (region,) = sptc.report(compiled).regions
    assert (region.status, region.rule) == ("refused", rule)


WRITES = {
    "itself": lambda y, v: y.add_(v),
    "a view": lambda y, v: y.view(-1, 8).mul_(2.0),
    "a copy, as its strides are": lambda y, v: y.transpose(1, 2).reshape(2, 11, 16).mul_(2.0),
    "by strides": lambda y, v: y.as_strided((8,), (1,)).mul_(2.0),
}


class Followed(torch.nn.Module):
    """Attention whose result is written to in place, if at all, and leaves the graph as `returned` has it."""

    def __init__(self, returned, write=lambda y, v: None):
        super().__init__()
        self.qkv, self.returned, self.write = torch.nn.Linear(16, 48), returned, write

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = (q @ k.mT).softmax(-1) @ v
        self.write(y, v)
        return self.returned(y)


@pytest.mark.parametrize("what", WRITES)
def test_a_result_that_is_written_to_stays_for_backward_and_keeps_its_strides(what):
    torch.manual_seed(0)
    model, x = Followed(RETURNS["as rows"], WRITES[what]), torch.randn(2, 11, 16)
    want = gradients(model, model(x).square().sum())
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    assert_gradients_close(gradients(model, compiled(x).square().sum()), want)


RETURNS = {
    "itself": lambda y: y,
    "what is computed of its elements": lambda y: y * 2,
    "turned": lambda y: y.transpose(1, 2),
    "turned, of its elements": lambda y: y.transpose(1, 2) * 2,
    "as rows": lambda y: y.transpose(1, 2).flatten(2),
}


@pytest.mark.parametrize("how", RETURNS)
def test_what_leaves_the_graph_has_the_strides_of_the_dense_model(how):
    torch.manual_seed(0)
    model, x = Followed(RETURNS[how]), torch.randn(2, 11, 16)
    got, want = torch.compile(model, backend=without_inductor(**FULL))(x), model(x)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()


def test_heads_that_are_put_together_are_not_copied():
    (unit,) = rewritten(Followed(RETURNS["as rows"]), {"x": torch.randn(2, 11, 16)})
    targets = {node.target for node in unit.gm.graph.nodes}
    assert not targets & {torch.ops.aten.clone.default, torch.ops.aten.contiguous.default}
