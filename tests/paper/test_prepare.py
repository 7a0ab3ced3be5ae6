"""Whole models, prepared: state on every region, trained through the compiled graph, kept through a model's life."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._logging import warning_once

import sptc
from sptc.backend import compile_graph
from sptc.config import Config, ConfigError
from sptc.model.capture import CaptureError
from sptc.paper.adapter import AdapterError
from sptc.paper.fit import fit_router
from sptc.paper.prepare import PrepareError
from sptc.paper.state import Codebook, Router, owners
from tests.models.zoo import CASES

OPTIONS = {
    "decline": "never",
    "ffn.selector": "router",
    "attention.selector": "pq",
    "attention.density": 0.5,
    "attention.query_block": 4,
    "attention.key_block": 4,
}
D, HIDDEN, HEADS = 16, 64, 2


class Compiled:
    """The spt backend without Inductor, and what it was called with."""

    def __init__(self, **options):
        self.config = Config.from_options({**OPTIONS, **options})
        self.reports = []

    def __call__(self, gm, example_inputs):
        graph = compile_graph(gm, example_inputs, self.config, lambda g, inputs, _: aot_autograd(fw_compiler=lambda m, _: m)(g, inputs))
        self.reports.append(graph.report)
        return graph


def slots(model):
    """All slots by their full name."""
    return {f"{name}.{key}": slot for name, owner in owners(model) for key, slot in owner.spt.slots().items()}


def rewritten(report):
    return [r for r in report.regions if r.status == "rewritten" and r.kind != "loss"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        heads = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2))


class Ffn(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.ffn = Attention(), Ffn()
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.ffn(self.norm(x))


class Model(nn.Module):
    """Layers with a pause (a graph break, or nothing) between them, dropout, and a buffer that counts calls."""

    def __init__(self, layers=2, pause=lambda: None):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.register_buffer("calls", torch.zeros(()))
        self.pause = pause

    def forward(self, x):
        self.calls.add_(1)
        for layer in self.layers:
            x = F.dropout(layer(x), 0.1, self.training)
            self.pause()
        return x


def batch(length=12, seed=0):
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(seed))


def block_norms(ffn, x):
    """[N, blocks]: the norm of what each block of hidden units adds to the output."""
    blocks = Config().ffn_blocks
    parts = zip(F.gelu(ffn.up(x)).chunk(blocks, 1), ffn.down.weight.chunk(blocks, 1), strict=True)
    return torch.stack([(units @ weight.T).norm(dim=1) for units, weight in parts], 1).detach()


def make(name, checkpointed):
    case = CASES[name]
    model, inputs = case.make()
    if checkpointed:
        model.gradient_checkpointing_enable()
    return case, model, inputs


@pytest.mark.parametrize(
    "name, checkpointed",
    [("opt-eager-padded", True), ("decoder-post-padded", False), ("gpt", False)],
)
def test_every_rewritten_region_has_state_that_trains(name, checkpointed):
    case, model, inputs = make(name, checkpointed)
    before, expected = copy.deepcopy(model.state_dict()), case.loss(model(**inputs))
    report = sptc.prepare(model, inputs, OPTIONS)
    assert len(rewritten(report)) == len(slots(model)) == len(case.attention) + case.ffn
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(case.loss(model(**inputs)), expected)  # eager: exactly what it was
    routers = [s for s in slots(model).values() if isinstance(s, Router)]
    books = [s for s in slots(model).values() if isinstance(s, Codebook)]
    fitted = [b.codebooks.clone() for b in books]

    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    backend = Compiled()
    loss = case.loss(torch.compile(model, backend=backend)(**inputs))
    loss.backward()
    assert sum(len(rewritten(r)) for r in backend.reports) == len(slots(model))
    assert torch.isfinite(loss) and not torch.equal(loss, expected)
    assert all(p.grad is not None and p.grad.any() for router in routers for p in router.parameters())
    starts = [p.detach().clone() for router in routers for p in router.parameters()]
    assert all((b.code_counts.sum(-1) > 0).all() for b in books)  # every head and subspace has counted its queries and keys
    optimizer.register_step_post_hook(lambda *_: sptc.step(model))
    optimizer.step()
    assert all(not torch.equal(a, p) for a, p in zip(starts, (p for r in routers for p in r.parameters()), strict=True))
    assert all(not torch.equal(a, b.codebooks) and not b.code_counts.any() for a, b in zip(fitted, books, strict=True))


def test_the_run_leaves_no_trace():
    model = Model().train()
    model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    state, python, buffers = torch.get_rng_state(), random.getstate(), model.calls.clone()
    sptc.prepare(model, batch(), OPTIONS)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python and torch.equal(model.calls, buffers)
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules() if "spt" not in type(m).__module__] == modes
    assert not model.layers[1].ffn.spt.training
    model.calls.zero_()
    compiled = torch.compile(model, backend="eager")
    for length in (12, 12):  # sizes that prepare saw are not remembered
        assert compiled(batch(length)).shape == (2, length, D)
    assert model.calls == 2


def test_state_starts_from_the_layer_and_the_batch():
    model = Model().eval()
    sptc.prepare(model, (batch(),), OPTIONS)
    found = slots(model)
    assert list(found) == [f"layers.{i}.{part}" for i in range(2) for part in ("attention.attention0", "ffn.ffn0")]
    x = model.layers[0]
    hidden = x.norm(batch() + x.attention(x.norm(batch())))
    router = found["layers.0.ffn.ffn0"]
    assert not router.weight.any() and not router.bias.any()
    logits = hidden.flatten(0, 1) @ router.start_weight.T + router.start_bias
    torch.testing.assert_close(logits.square().mean().sqrt(), torch.tensor(1.0), rtol=1e-4, atol=0)
    norms = block_norms(x.ffn, hidden.flatten(0, 1))
    wanted = norms - norms.mean(1, keepdim=True)
    assert torch.corrcoef(torch.stack((logits.flatten(), wanted.flatten())))[0, 1] > 0.8, "regression on 24 tokens of 16 features"
    q, k, _ = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in x.attention.qkv(x.norm(batch())).chunk(3, -1))
    vectors = torch.cat([q, k], 2).transpose(0, 1).flatten(1, 2)  # [h, N, d]
    book = found["layers.0.attention.attention0"].codebooks[:, 0]  # one subspace of 8
    error = torch.cdist(vectors, book).amin(-1).square().mean()
    assert error < 0.7 * (vectors - vectors.mean(1, keepdim=True)).square().sum(-1).mean()


@pytest.mark.parametrize("how", ["deepcopy", "load_state_dict", "bfloat16"])
def test_two_instances_share_code_but_not_state(how):
    torch.manual_seed(0)
    model = Model(layers=1).eval()
    sptc.prepare(model, batch(), OPTIONS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for slot in slots(other).values():
            for tensor in slot.tensors()[:2]:
                tensor.copy_(torch.randn_like(tensor))
    if how == "load_state_dict":
        twin = copy.deepcopy(model)
        twin.load_state_dict(other.state_dict())
        other = twin
    x = batch()
    if how == "bfloat16":
        other, x = other.to(torch.bfloat16), batch().to(torch.bfloat16)
        assert all(s.codebooks.dtype is torch.float32 for s in slots(other).values() if isinstance(s, Codebook))
    backend = Compiled()
    mine, theirs = torch.compile(model, backend=backend)(batch()), torch.compile(other, backend=backend)(x)
    assert len(backend.reports) == (2 if how == "bfloat16" else 1)
    assert not torch.equal(mine, theirs.to(mine.dtype))
    theirs.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for s in slots(other).values() for p in s.parameters())
    torch._dynamo.reset()
    assert torch.equal(theirs, torch.compile(other, backend=Compiled())(x))  # what code of its own computes


def test_modes_and_lengths_change():
    torch.manual_seed(0)
    model = Model(layers=1)
    sptc.prepare(model, batch(), OPTIONS)
    books = [s for s in slots(model).values() if isinstance(s, Codebook)]
    compiled = torch.compile(model, backend=(backend := Compiled()))
    for length, training in ((12, True), (9, True), (9, False), (17, True), (12, False), (12, True)):
        sptc.step(model)
        model.train(training)
        compiled(batch(length))
        counted = 2 * length * 2 * HEADS if training else 0  # queries and keys of 2 rows
        assert all(b.code_counts.sum() == counted for b in books)
    assert all(len(rewritten(r)) == 2 for r in backend.reports)
    assert len(backend.reports) <= 4  # static, then dynamic lengths; train and eval


def test_graph_breaks_between_layers_leave_each_layer_its_own_state():
    torch.manual_seed(0)
    model = Model(layers=4, pause=torch._dynamo.graph_break).eval()
    sptc.prepare(model, batch(), OPTIONS)
    assert len(slots(model)) == 8
    routers = [s for s in slots(model).values() if isinstance(s, Router)]
    inputs = []
    hooks = [layer.ffn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).detach())) for layer in model.layers]
    model(batch())
    for hook in hooks:
        hook.remove()
    for router, layer, x in zip(routers, model.layers, inputs, strict=True):
        weight, bias = fit_router(x, block_norms(layer.ffn, x))
        torch.testing.assert_close((router.start_weight, router.start_bias), (weight, bias), atol=1e-3, rtol=1e-3)
    backend = Compiled()
    torch.compile(model, backend=backend)(batch()).sum().backward()
    assert len(backend.reports) < 4  # one graph serves several layers
    assert all(p.grad is not None and p.grad.any() for router in routers for p in router.parameters())


def test_regional_compile_serves_many_layers_without_recompiling():
    model = Model(layers=10).eval()
    options = {"attention.enabled": False}
    sptc.prepare(model, batch(), {**OPTIONS, **options})
    backend = Compiled(**options)
    for layer in model.layers:
        layer.compile(backend=backend)
    model(batch().requires_grad_()).sum().backward()
    assert len(backend.reports) == 1 and len(rewritten(backend.reports[0])) == 1 and len(slots(model)) == 10
    assert all(p.grad is not None and p.grad.any() for s in slots(model).values() for p in s.parameters())


def test_code_compiled_before_does_not_stay():
    model = Model().eval()
    compiled = torch.compile(model, backend=Compiled())
    compiled(batch())
    sptc.prepare(compiled, batch(), OPTIONS)
    compiled(batch()).sum().backward()
    assert slots(model) and all(p.grad is not None for s in slots(model).values() for p in s.parameters())


def test_state_depends_on_the_model_and_the_options_alone():
    keys = set()
    for length in (1, 12):  # so short that nothing would pay, on a machine of any speed
        model = Model()
        sptc.prepare(model, batch(length), {**OPTIONS, "decline": "auto"})
        keys.add(tuple(model.state_dict()))
    assert len(keys) == 1 and len(slots(model)) == 4
    model = Model()
    report = sptc.prepare(model, batch(), {**OPTIONS, "attention.selector": "pooled"})
    assert len(rewritten(report)) == 4 and all(isinstance(s, Router) for s in slots(model).values())


def test_blocks_that_do_not_divide_refuse_the_ffn_and_other_blocks_are_kept():
    model = Model()
    report = sptc.prepare(model, batch(), {**OPTIONS, "ffn.blocks": 5, "attention.enabled": False})
    assert {(r.kind, r.rule) for r in report.regions if r.status == "refused"} == {("ffn", "blocks")} and not slots(model)
    sptc.prepare(model, batch(), {**OPTIONS, "ffn.blocks": 4})
    backend = Compiled()  # ffn.blocks left out: the state knows
    torch.compile(model, backend=backend)(batch())
    assert {r.settings["blocks"] for r in rewritten(backend.reports[0]) if r.kind == "ffn"} == {4}
    for blocks, agrees in ((4, True), (16, False)):  # 16 is the default: said aloud, it contradicts the state
        torch._dynamo.reset()
        with nullcontext() if agrees else pytest.raises(BackendCompilerFailed, match=r"'ffn\.blocks' is 16.* prepared for 4 blocks"):
            torch.compile(model, backend=Compiled(**{"ffn.blocks": blocks}))(batch())


def test_a_region_of_the_outermost_module_is_refused_unless_dynamo_wraps_it():
    model = Ffn()
    report = sptc.prepare(model, batch(), OPTIONS)
    assert any(r.rule == "state" and "outermost module" in r.reason for r in report.regions) and not slots(model)
    with torch._dynamo.config.patch(wrap_top_frame=True):
        sptc.prepare(model, batch(), OPTIONS)
        torch.compile(model, backend=Compiled())(batch()).sum().backward()
    assert all(p.grad is not None for s in slots(model).values() for p in s.parameters()) and slots(model)


class Parted(nn.Module):
    """An FFN whose module breaks the graph after it: its output, and so its state, is in another graph."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x):
        x = self.down(F.relu(self.up(x)))
        torch._dynamo.graph_break()
        return x + 1


def test_a_region_parted_from_its_module_is_refused():
    model = nn.Sequential(Parted(), nn.Tanh())
    report = sptc.prepare(model, batch(), OPTIONS)
    assert any(r.rule == "state" and "graph break" in r.reason for r in report.regions) and not slots(model)


def test_errors_are_clear_and_leave_nothing_half_attached():
    model = Model()
    with pytest.raises(ConfigError, match=r"ffn\.blocks"):
        sptc.prepare(model, batch(), {"ffn.block": 4})
    with pytest.raises(PrepareError, match=r"no trainable state.*'ffn\.selector': 'router'"):
        sptc.prepare(model, batch())
    with pytest.raises(PrepareError, match=r"nn\.Module"):
        sptc.prepare(lambda x: x, batch(), OPTIONS)
    with pytest.raises(PrepareError, match="before DataParallel"):
        sptc.prepare(nn.DataParallel(model), batch(), OPTIONS)
    with pytest.raises(PrepareError, match="meta device"):
        sptc.prepare(Model().to("meta"), batch(), OPTIONS)
    with pytest.raises(PrepareError, match="scripted"):
        sptc.prepare(nn.Sequential(torch.jit.script(nn.Linear(D, D))), batch(), OPTIONS)
    with pytest.raises(CaptureError, match="example_inputs"):
        sptc.prepare(model, 3, OPTIONS)
    model.layers[1].ffn.spt = nn.Identity()
    with pytest.raises(PrepareError, match=r"layers\.1\.ffn has an attribute 'spt'"):
        sptc.prepare(model, batch(), OPTIONS)
    del model.layers[1].ffn.spt
    assert not list(owners(model)) and not any("spt" in key for key in model.state_dict())
    sptc.prepare(model, batch(), OPTIONS)
    with pytest.raises(PrepareError, match="prepared already"):
        sptc.prepare(model, batch(), OPTIONS)


def test_a_failing_second_run_detaches_all():
    class Fails(Model):
        def forward(self, x):
            if any("spt" in name for name, _ in self.named_modules()):
                raise RuntimeError("hooks are not welcome")
            return super().forward(x)

    model = Fails()
    with pytest.raises(RuntimeError, match="not welcome"):
        sptc.prepare(model, batch(), OPTIONS)
    assert not list(owners(model)) and not any("spt" in key for key in model.state_dict())


def adapted(base, **more):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(r=2, target_modules=["qkv", "up", "down"], **more))


def randomised(model):
    with torch.no_grad():
        for slot in slots(model).values():
            for tensor in slot.tensors():
                tensor.add_(torch.rand_like(tensor))
    return {name: [t.clone() for t in slot.tensors()] for name, slot in slots(model).items()}


@pytest.mark.parametrize("order", ["load, prepare, load", "prepare, load"])
def test_an_adapter_saves_and_loads_the_state(order, tmp_path):
    from peft import PeftModel

    base = Model(layers=1)
    fresh = copy.deepcopy(base)
    model = adapted(base, modules_to_save=["norm"])
    report = sptc.prepare(model, batch(), OPTIONS)
    assert len(rewritten(report)) == len(slots(model)) == 2
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and ".spt." in name}
    assert len(trainable) == 5 and all(".modules_to_save.default." in name for name in trainable)
    torch.compile(model, backend=Compiled())(batch()).square().sum().backward()
    assert all(dict(model.named_parameters())[name].grad.any() for name in trainable)
    saved = randomised(model)
    model.save_pretrained(tmp_path)
    if order == "prepare, load":
        sptc.prepare(fresh, batch(), OPTIONS)
        loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    else:
        loaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
        sptc.prepare(loaded, batch(), OPTIONS)
        loaded.load_adapter(tmp_path, loaded.active_adapter, is_trainable=True)
    assert list(slots(loaded)) == list(saved)
    assert all(torch.equal(a, b) for name, slot in slots(loaded).items() for a, b in zip(slot.tensors(), saved[name], strict=True))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad and ".spt." in name} == trainable
    torch._dynamo.reset()
    backend = Compiled()
    outputs = [torch.compile(m.eval(), backend=backend)(batch()) for m in (model, loaded)]
    assert torch.equal(*outputs) and all(len(rewritten(report)) == 2 for report in backend.reports)


def test_an_adapter_that_saves_no_modules_is_an_error():
    from peft import TrainableTokensConfig, get_peft_model

    _, base, inputs = make("opt-sdpa", False)
    model = get_peft_model(base, TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match="TrainableTokensConfig"):
        sptc.prepare(model, inputs, OPTIONS)
    assert not list(owners(model))


@pytest.mark.parametrize("other", ["eager", "aot_eager"])
def test_another_backend_is_said_once_and_ours_never(other, caplog):
    def said() -> int:
        return sum("it runs dense" in record.getMessage() for record in caplog.records)

    warning_once.cache_clear()
    model = Model()
    sptc.prepare(model, batch(), OPTIONS)
    sptc.explain(model, batch(), OPTIONS)
    torch.compile(model, backend=Compiled())(batch()).sum().backward()
    assert said() == 0
    torch._dynamo.reset()
    for length in (12, 14):
        torch.compile(model, backend=other)(batch(length)).sum().backward()
    assert said() == 1


def test_detaching_gives_back_the_plain_model():
    model = Model().eval()
    names = list(model.state_dict())
    expected = torch.compile(copy.deepcopy(model), backend=Compiled())(batch())
    sptc.prepare(model, batch(), OPTIONS)
    randomised(model)
    assert not torch.allclose(torch.compile(model, backend=Compiled())(batch()), expected)
    assert sptc.detach(torch.compile(model)) is model
    assert list(model.state_dict()) == names and not list(owners(model)) and not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.compile(model, backend=Compiled())(batch()), expected)
    assert len(rewritten(sptc.prepare(model, batch(), OPTIONS))) == len(slots(model)), "it can be prepared anew"
    assert sptc.detach(sptc.detach(model)) is model


@pytest.mark.parametrize("other", [None, ["norm"]])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_detached_adapter_saves_what_a_plain_one_does(other, loaded, tmp_path):
    from peft import PeftModel

    base = Model(layers=1)
    fresh = copy.deepcopy(base)
    model = adapted(base, modules_to_save=other)
    before = sorted(dict(model.named_parameters()))
    sptc.prepare(model, batch(), OPTIONS)
    if loaded:
        model.save_pretrained(tmp_path / "prepared")
        sptc.prepare(fresh, batch(), OPTIONS)
        model = PeftModel.from_pretrained(fresh, tmp_path / "prepared", is_trainable=True)
    sptc.detach(model)
    assert sorted(dict(model.named_parameters())) == before
    assert model.peft_config["default"].modules_to_save == other
    model.save_pretrained(tmp_path / "plain")
    assert "spt" not in (tmp_path / "plain" / "adapter_config.json").read_text()
    with safe_open(tmp_path / "plain" / "adapter_model.safetensors", "pt") as saved:
        keys = list(saved.keys())
    assert keys and not [key for key in keys if "spt" in key]


def test_a_prepared_adapter_merges_and_what_is_left_is_prepared():
    model = adapted(Model(layers=1)).eval()
    sptc.prepare(model, batch(), OPTIONS)
    randomised(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn_like(p))
    # With fewer blocks a merged adapter of `down` is not divided by their share, so that the two differ.
    backend = Compiled(**{"ffn.density": 1.0})
    with torch.no_grad():
        expected = torch.compile(model, backend=backend)(batch())
        merged = model.merge_and_unload()
        assert not [name for name in merged.state_dict() if "modules_to_save" in name or "lora" in name]
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(merged, backend=backend)(batch()), expected, rtol=1e-4, atol=1e-5)
    assert all(len(rewritten(report)) == 2 for report in backend.reports)
    assert not [name for name in sptc.detach(merged).state_dict() if "spt" in name]
