"""Marks bring each region the state of its own owner, and leave the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sptc.config import Config, ConfigError
from sptc.ir.region import RouterState
from sptc.paper.state import MARK, Codebook, DenseNotice, Router, TrainableState, attach
from sptc.passes.bind import bind
from sptc.passes.find.regions import find
from sptc.passes.graph.frame import frames, graphs, input_index, outermost
from sptc.passes.normalize.lower import lower
from sptc.passes.runner import run
from sptc.passes.unit import Unit

D, HIDDEN, HEADS, KEY_HEADS = 16, 32, 4, 2
FIND = ((lower, ""), (find, ""), (bind, ""))


class Layer(nn.Module):
    """Two FFNs and two attentions in one module; each part may run inside an activation checkpoint, one of them nested."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D * KEY_HEADS // HEADS), nn.Linear(D, D * KEY_HEADS // HEADS)
        self.fc1, self.fc2 = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.gate, self.up, self.other_fc2 = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.checkpointed = checkpointed

    def attend(self, x, causal):
        heads = (p(self.norm(x)).unflatten(-1, (-1, D // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)
        return x + y.transpose(1, 2).flatten(-2)

    def relu_ffn(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))

    def gated_ffn(self, x):
        return x + self.other_fc2(F.silu(self.gate(x)) * self.up(x))

    def nested(self, x):
        return self.attend(self.run(self.relu_ffn, x), True)

    def run(self, f, *args):
        return checkpoint(f, *args, use_reentrant=False) if self.checkpointed else f(*args)

    def forward(self, x):
        x = self.attend(x, False)
        x = self.run(self.nested, x)
        return None, (self.run(self.gated_ffn, x),)


class Model(nn.Module):
    """Two layers, the first called twice."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(checkpointed) for _ in range(2))

    def forward(self, x):
        for layer in (*self.layers, self.layers[0]):
            x = layer(x)[1][0]
        return x


def router(down, blocks=4, width=D):
    stand_in = (torch.randn(1, width), torch.randn(width, 1), torch.zeros(width))
    return Router((torch.randn(blocks, width), torch.zeros(blocks)), stand_in, down)


def codebook(heads=KEY_HEADS):
    return Codebook(torch.randn(heads, 1, 16, D // HEADS))


def full_slots():
    return {"ffn0": router("other_fc2.weight", 2), "ffn1": router("fc2.weight"), "attention0": codebook(), "attention1": codebook()}


def marked(model, slots=full_slots):
    notice = DenseNotice()
    for layer in model.layers:
        attach(layer, TrainableState(slots(), notice))
    return model


def bound(model, config=None, length=5):
    """The bound units of a model's graphs, one a graph, after a run of what they hold."""
    units = []

    def backend(gm, example_inputs):
        units.append(run(Unit(gm, tuple(example_inputs), config or Config()), FIND))
        return units[-1].gm.forward

    out = torch.compile(model, backend=backend)(torch.randn(2, length, D, generator=torch.Generator().manual_seed(0)))
    return units, out


def tensor_behind(unit, region, node):
    frame = next(f for f in frames(unit.gm) if f.gm.graph is region.y.graph)
    return unit.example_inputs[input_index(outermost(node, frame))]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_each_region_receives_the_tensors_of_its_owner_and_slot(checkpointed):
    torch.manual_seed(0)
    model = marked(Model(checkpointed)).train()
    (unit,), out = bound(model)
    assert not unit.refusals and len(unit.regions) == len(unit.states) == 3 * 4
    attentions = {}  # seen of each owner's call
    for region in unit.regions:
        slots = model.get_submodule(region.site.module).spt.slots()
        state = unit.states[region]
        if region.kind == "ffn":
            slot = slots["ffn0" if len(region.ups) == 2 else "ffn1"]
            nodes = tuple(getattr(state, name) for name in ("weight", "bias", "start_weight", "start_bias", "low", "high", "constant"))
            assert state.trainable
        else:
            index = attentions.get(region.site.owner, 0)
            attentions[region.site.owner] = index + 1
            slot = slots[f"attention{index}"]
            nodes = (state.codebooks, state.code_sums, state.code_counts)
        assert state.training
        assert all(tensor_behind(unit, region, node) is tensor for node, tensor in zip(nodes, slot.tensors(), strict=True))
        assert all(node.graph is region.y.graph and node < region.y for node in nodes)
        assert all(node.meta["val"].shape == tensor.shape for node, tensor in zip(nodes, slot.tensors(), strict=True))
    assert not any(node.target is MARK for gm in graphs(unit.gm) for node in gm.graph.nodes)
    eager = Model(checkpointed)
    eager.load_state_dict(model.state_dict(), strict=False)
    expected = eager(torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0)))
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(out, expected)
    grads = dict(model.named_parameters())
    assert all(torch.equal(grads[name].grad, p.grad) for name, p in eager.named_parameters())


def test_eval_and_a_frozen_router_are_told():
    model = marked(Model()).eval()
    model.layers[1].spt.requires_grad_(False)
    (unit,), _ = bound(model)
    assert not any(state.training for state in unit.states.values())
    trainable = {region.site.module: state.trainable for region, state in unit.states.items() if isinstance(state, RouterState)}
    assert trainable == {"layers.0": True, "layers.1": False}


def test_a_region_without_a_slot_gets_no_entry():
    (unit,), _ = bound(marked(Model(), lambda: {"ffn0": router("fc2.weight"), "attention1": codebook()}))
    assert not unit.refusals and len(unit.regions) == 12
    assert sorted(r.kind for r in unit.states) == ["attention"] * 3 + ["ffn"] * 3
    assert all(r.mask.causal for r in unit.states if r.kind == "attention")  # the second one


@pytest.mark.parametrize(
    "slots, kind, reason",
    [
        (lambda: {"ffn0": router("fc2.weight", width=D + 1)}, "ffn", "input has 16 features"),
        (lambda: {"ffn0": router("fc2.weight", blocks=5)}, "ffn", "5 blocks, which do not divide the FFN's hidden size 32"),
        (lambda: {"attention0": codebook(HEADS)}, "attention", "2 key heads of size 4"),
        (lambda: {"ffn0": router("down.weight")}, "ffn", "belongs to down.weight"),
        (lambda: {"attention2": codebook()}, "attention", "belongs to an attention that was not found"),
    ],
    ids=["width", "blocks", "heads", "name", "order"],
)
def test_state_that_does_not_fit_refuses_the_region(slots, kind, reason):
    (unit,), _ = bound(marked(Model(), slots))
    assert unit.refusals and {(r.kind, r.rule) for r in unit.refusals} == {(kind, "state")}
    for refusal in unit.refusals:
        assert reason in refusal.reason and refusal.site.module in ("layers.0", "layers.1")
        assert refusal.node not in {r.y for r in unit.regions}
    assert not unit.states


def test_shapes_of_the_state_win_over_defaults_and_contradict_options():
    model = marked(Model())
    (unit,), _ = bound(model, Config.from_options({"ffn.density": 0.5}))
    assert len(unit.states) == 12
    for blocks in (8, Config().ffn_blocks):  # the default is as wrong as any other number when it is asked for
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
            bound(model, Config.from_options({"ffn.blocks": blocks}))
        assert isinstance(caught.value.inner_exception, ConfigError) and f"'ffn.blocks' is {blocks}" in str(caught.value)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"attention.selector.*'pooled'.*layers.0"):
        bound(model, Config.from_options({"attention.selector": "pooled"}))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x):
        x = self.fc2(torch.relu(self.fc1(x)))
        torch._dynamo.graph_break()
        return x + 1


def test_a_mark_without_its_region_is_reported():
    model = nn.Module()
    model.layers = nn.ModuleList([Broken()])
    model.forward = lambda x: model.layers[0](x)
    units, _ = bound(marked(model, lambda: {"ffn0": router("fc2.weight")}))
    assert [len(u.regions) for u in units] == [1, 0, 0] and not any(u.states for u in units)
    (refusal,) = [r for u in units for r in u.refusals]
    assert refusal.rule == "state" and "graph break" in refusal.reason
    torch._dynamo.reset()
    units, _ = bound(model, Config(ffn_enabled=False))
    assert not any(r.rule == "state" for u in units for r in u.refusals)


class Chain(nn.Module):
    """The input of each region is the marked output of another owner."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D)) for _ in range(3)])
        self.outer = nn.Identity()

    def forward(self, x):
        for layer in self.layers:
            x = self.outer(layer(x))
        return x


def test_regions_next_to_marks_hold_no_erased_node():
    model = Chain()
    attach(model.outer, TrainableState({"ffn0": router("x.weight")}, DenseNotice()))
    (unit,), _ = bound(model)
    nodes = {node for gm in graphs(unit.gm) for node in gm.graph.nodes}
    for region in unit.regions:
        used = {region.x, region.y, region.down.x, *region.nodes, *(n for up in region.ups for n in (up.x, *up.nodes))}
        assert used <= nodes
    assert len(unit.regions) == 3 and all(a.y is b.x for a, b in zip(unit.regions, unit.regions[1:], strict=False))
    assert {r.node for r in unit.refusals} <= nodes


def test_state_of_a_container_belongs_to_the_module_around_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D))

        def forward(self, x):
            return x + self.mlp(x)

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    model.forward = lambda x: model.layers[0](x)
    (unit,), _ = bound(marked(model, lambda: {"ffn0": router("mlp.2.weight")}))
    ((region, state),) = unit.states.items()
    assert region.site.module.endswith("layers.0.mlp")
    assert tensor_behind(unit, region, state.weight) is model.layers[0].spt.slots()["ffn0"].weight


def test_names_are_not_needed_where_they_are_unknown():
    """DDP splits a graph and its parts know no sources: a single FFN and a single slot still belong together."""
    units = []

    def backend(gm, example_inputs):
        for node in gm.graph.find_nodes(op="placeholder"):
            del node._dynamo_source
        units.append(run(Unit(gm, tuple(example_inputs), Config()), FIND))
        return gm.forward

    model = marked(Model(), lambda: {"ffn0": router("fc2.weight")})
    for layer in model.layers:
        layer.forward = layer.relu_ffn
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    torch.compile(model, backend=backend)(torch.randn(2, 5, D))
    assert len(units[0].states) == 2 and not units[0].refusals
