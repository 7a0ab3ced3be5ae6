"""FFN regions are found by what they are; each has twins that must be refused, with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sptc.config import Config
from sptc.passes.find.ffn import find_ffn
from sptc.passes.graph.frame import graphs
from sptc.passes.normalize.lower import lower
from sptc.passes.unit import Unit

D, H = 8, 16


def found(model, x=None):
    """What is found in a model's graphs: (regions, refusals)."""
    results = []

    def backend(gm, example_inputs):
        unit = lower(Unit(gm, tuple(example_inputs), Config()))
        results.extend(find_ffn(g) for g in graphs(unit.gm))
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(2, 5, D) if x is None else x)
    return [r for f in results for r in f.regions], [r for f in results for r in f.refusals]


class Ffn(nn.Module):
    """down(act(up_0(x), ...)), with the act given as a function."""

    def __init__(self, act, ups=1, bias=True):
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(D, H, bias=bias) for _ in range(ups))
        self.down = nn.Linear(H, D, bias=bias)
        self.act = act

    def forward(self, x):
        return self.down(self.act(*(up(x) for up in self.ups)))


def new_gelu(u):
    return 0.5 * u * (1.0 + torch.tanh(0.7978845608028654 * (u + 0.044715 * torch.pow(u, 3.0))))


ACTS = {
    "relu": (F.relu, 1, "relu"),
    "gelu": (F.gelu, 1, "gelu"),
    "gelu-tanh": (lambda u: F.gelu(u, approximate="tanh"), 1, "gelu"),
    "gelu-eight-ops": (new_gelu, 1, "mul, pow, mul, add, mul, tanh, add, mul"),
    "squared-relu": (lambda u: F.relu(u).square(), 1, "relu, square"),
    "in-place": (lambda u: F.relu(u, inplace=True), 1, "relu"),
    "quick-gelu": (lambda u: u * torch.sigmoid(1.702 * u), 1, "mul, sigmoid, mul"),
    "exponent": (lambda u: 2.0 ** F.relu(u) - 1.0, 1, "relu, pow, sub"),
    "swiglu": (lambda u, v: F.silu(u) * v, 2, "silu, mul"),
    "swiglu-gate-last": (lambda u, v: u * F.silu(v), 2, "silu, mul"),
    "geglu": (lambda u, v: F.gelu(u) * v, 2, "gelu, mul"),
    "bilinear": (lambda u, v: u * v, 2, "mul"),
    "three": (lambda u, v, w: torch.tanh(u) * v + w, 3, "tanh, mul, add"),
    "nine": (lambda *u: F.silu(sum(u)), 9, "add, add, add, add, add, add, add, add, add, silu"),
}


@pytest.mark.parametrize("name", ACTS)
def test_any_elementwise_activation(name):
    act, ups, text = ACTS[name]
    (region,), refusals = found(Ffn(act, ups))
    assert not refusals
    assert (region.activation, len(region.ups), region.hidden) == (text, ups, H)
    assert region.down.bias is not None and all(up.bias is not None for up in region.ups)
    assert region.site.source.startswith("test_ffn.py:")


class Conv1d(nn.Module):
    """Weights stored [in, out], products on flattened tokens, as GPT-2 has it."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(D, H)), nn.Parameter(torch.zeros(H))
        self.w2, self.b2 = nn.Parameter(torch.randn(H, D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        h = torch.addmm(self.b1, x.view(-1, D), self.w1).view(2, 5, H)
        return torch.addmm(self.b2, F.gelu(h).view(-1, H), self.w2).view(2, 5, D)


class Matmul(Conv1d):
    def forward(self, x):
        return F.relu(x @ self.w1 + self.b1) @ self.w2 + self.b2


class Fused(nn.Module):
    """One product for gate and up, cut in two."""

    def __init__(self, cut):
        super().__init__()
        self.both, self.down, self.cut = nn.Linear(D, 2 * H), nn.Linear(H, D), cut

    def forward(self, x):
        gate, up = self.cut(self.both(x))
        return self.down(F.silu(gate) * up)


@pytest.mark.parametrize("model", [Conv1d(), Matmul()], ids=["addmm", "matmul"])
def test_projections_of_other_spellings(model):
    (region,), refusals = found(model)
    assert not refusals
    assert region.down.transposed and region.ups[0].transposed
    assert region.down.bias is not None and region.ups[0].bias is not None


@pytest.mark.parametrize(
    "cut",
    [lambda y: y.chunk(2, -1), lambda y: y.split(H, -1), lambda y: (y[..., :H], y[..., H:])],
    ids=["chunk", "split", "slice"],
)
def test_fused_gate_and_up(cut):
    (region,), refusals = found(Fused(cut))
    assert not refusals
    assert sorted(up.rows for up in region.ups) == [(0, H), (H, 2 * H)]
    assert region.ups[0].weight is region.ups[1].weight


def test_a_slice_that_starts_before_the_first_feature():
    (region,), refusals = found(Fused(lambda y: (y[..., -3 * H : H], y[..., H:])))
    assert not refusals
    assert sorted(up.rows for up in region.ups) == [(0, H), (H, 2 * H)]


def test_dropout_between_act_and_down():
    (region,), refusals = found(Ffn(lambda u: F.dropout(F.gelu(u), 0.25, True)))
    assert not refusals and region.dropout_p == 0.25 and region.activation == "gelu"


def test_lora_on_every_projection():
    from peft import LoraConfig, inject_adapter_in_model

    model = Ffn(lambda u, v: F.silu(u) * v, 2)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["ups.0", "ups.1", "down"]), model)
    (region,), refusals = found(model.train())
    assert not refusals
    for projection in (*region.ups, region.down):
        assert projection.lora is not None
        assert (projection.lora.scaling, projection.lora.dropout_p) == (3.0, 0.1)
    assert region.down.lora.low in region.nodes and region.ups[0].lora.low not in region.nodes


def test_inside_a_checkpoint():
    ffn = Ffn(F.gelu)
    (region,), refusals = found(lambda x: checkpoint(ffn, x, use_reentrant=False))
    assert not refusals
    assert any(n.op == "placeholder" and n is region.x for n in region.y.graph.nodes)


def test_products_of_activations_are_no_projections():
    """relu(q k^T) v over one sequence looks like an FFN whose weights are k and v."""
    q, k, v = (nn.Linear(D, D) for _ in range(3))
    assert found(lambda x: F.relu(q(x) @ k(x).T) @ v(x), torch.randn(5, D)) == ([], [])


def test_a_computed_weight_is_a_projection():
    model = Ffn(F.gelu)
    torch.nn.utils.parametrizations.weight_norm(model.ups[0])
    (region,), refusals = found(model)
    assert not refusals and region.ups[0].weight.op == "call_function"


def test_a_computed_weight_in_a_checkpoint_is_a_projection():
    model = Ffn(F.gelu)
    torch.nn.utils.parametrizations.weight_norm(model.ups[0])
    (region,), refusals = found(lambda x: checkpoint(model, x, use_reentrant=False))
    assert not refusals and region.ups[0].weight.op == "call_function"


def test_one_refusal_for_all_that_reads_a_hidden_value():
    model, other = Escapes(F.gelu), nn.Linear(H, D)
    regions, refusals = found(lambda x: [y + other(h) for y, h in [model(x)]])
    assert not regions and len(refusals) == 1


def test_two_in_one_block():
    first, second = Ffn(F.gelu), Ffn(F.relu)
    regions, refusals = found(lambda x: x + first(x) + second(x))
    assert not refusals and [r.activation for r in regions] == ["gelu", "relu"]


@pytest.mark.parametrize("gate", [0, 1])
def test_the_gate_comes_first(gate):
    """What a router without training goes by must not depend on how a model is spelled."""
    model = Ffn(lambda *u: u[1 - gate] * F.silu(u[gate]), 2)
    names = {p: name for name, p in model.named_parameters()}
    (region,), _ = found(model)
    assert names[region.ups[0].weight.meta["grapharg"].example] == f"ups.{gate}.weight"


@pytest.mark.parametrize(
    "stack",
    [
        nn.Sequential(nn.Linear(D, H), nn.Linear(H, D)),
        nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)),
        Ffn(lambda u, v: (2.0 * u - v / 3.0 + 1.0) * 0.5, 2),
    ],
    ids=["stack", "norm", "sum"],
)
def test_not_an_ffn(stack):
    assert found(lambda x: x + stack(x)) == ([], [])


class Escapes(Ffn):
    def forward(self, x):
        h = self.act(self.ups[0](x))
        return self.down(h), h


class Unequal(Ffn):
    def forward(self, x):
        return self.down(self.act(self.ups[0](x), self.ups[1](x + 1)))


class Mutated(Ffn):
    def forward(self, x):
        x = x + 1
        u = self.ups[0](x)
        x.mul_(2)
        return self.down(F.gelu(u)) + x


class MutatedThroughAView(Ffn):
    def forward(self, x):
        x = x + 1
        row = x[0]
        u = self.ups[0](x)
        row.zero_()
        return self.down(F.gelu(u)) + x


class SwitchesMode(Ffn):
    def forward(self, x):
        u = self.ups[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.down(F.gelu(u))


class Scaled(Ffn):
    def __init__(self):
        super().__init__(F.gelu)
        self.scale = nn.Parameter(torch.ones(H))

    def forward(self, x):
        return self.down(F.gelu(self.ups[0](x)) * self.scale)


class Residual(Ffn):
    def forward(self, x):
        return self.down(F.gelu(self.ups[0](x)) + torch.cat([x, x], -1))


class Outer(Ffn):
    """Additive attention: every pair of positions, not every position."""

    def forward(self, x):
        return self.down(torch.tanh(self.ups[0](x).unsqueeze(2) + self.ups[1](x).unsqueeze(1)))


TWINS = {
    "integers": (Ffn(lambda u: F.relu(u).to(torch.int32).to(torch.float32)), "activation", "rounds"),
    "broadcast": (Outer(F.gelu, 2), "shape", "broadcasts"),
    "softmax": (Ffn(lambda u: u.softmax(-1)), "activation", "softmax"),
    "layer-norm": (Ffn(lambda u: F.layer_norm(F.gelu(u), (H,))), "activation", "layer_norm"),
    "mean-norm": (Ffn(lambda u: F.relu(u) * torch.rsqrt(u.square().mean(-1, keepdim=True))), "activation", "mean"),
    "unit-parameter": (Scaled(), "activation", "parameter of its own"),
    "inner-dropout": (Ffn(lambda u: F.gelu(F.dropout(u, 0.5, True))), "dropout", "inside the activation"),
    "escapes": (Escapes(F.gelu), "escapes", "gelu"),
    "unequal-inputs": (Unequal(lambda u, v: F.silu(u) * v, 2), "inputs", "different inputs"),
    "mutated": (Mutated(F.gelu), "mutated", "mul_"),
    "mutated-view": (MutatedThroughAView(F.gelu), "mutated", "zero_"),
    "mode": (SwitchesMode(F.gelu), "mode-boundary", "autocast"),
    "operand": (Residual(F.gelu), "operand", "computed by no projection"),
    "in-place-read-twice": (Ffn(lambda u: u.view(10, H).relu_().view(u.shape) * u), "mutated", "relu_"),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_refused(name):
    model, rule, reason = TWINS[name]
    regions, (refusal,) = found(model)
    assert not regions
    assert refusal.kind == "ffn" and refusal.rule == rule and reason in refusal.reason
    assert refusal.site.source.startswith("test_ffn.py:")


class TwoAdapters(nn.Module):
    """A linear layer with low-rank adapters, as PEFT adds them up."""

    def __init__(self, size, out, adapters):
        super().__init__()
        self.base = nn.Linear(size, out)
        self.lora_A = nn.ModuleDict({name: nn.Linear(size, 2, bias=False) for name in adapters})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, out, bias=False) for name in adapters})

    def forward(self, x):
        y = self.base(x)
        for name, low in self.lora_A.items():
            y = y + self.lora_B[name](low(x)) * 0.5
        return y


@pytest.mark.parametrize(("up", "down"), [(["en", "de"], []), ([], ["en", "de"]), (["en", "de"], ["en", "de"]), (["en", "de"], ["en"])])
def test_two_active_adapters_are_named(up, down):
    _, refusals = found(nn.Sequential(TwoAdapters(D, H, up), nn.GELU(), TwoAdapters(H, D, down)))
    (refusal,) = refusals
    assert refusal.rule == "adapters" and "2 active adapters (lora_A.en, lora_A.de)" in refusal.reason


def test_one_active_adapter_is_none_too_many():
    (region,), refusals = found(nn.Sequential(TwoAdapters(D, H, ["en"]), nn.GELU(), TwoAdapters(H, D, ["de"])))
    assert not refusals and region.down.lora is not None and region.ups[0].lora is not None
