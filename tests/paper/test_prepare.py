"""Whole models, prepared: state on every region, trained through the compiled graph, kept through a model's life."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._logging import warning_once

import sptc
from sptc.config import Config, ConfigError
from sptc.model.capture import CaptureError
from sptc.paper.fit import fit_router
from sptc.paper.prepare import PrepareError
from sptc.paper.state import Codebook, Router, owners
from tests.paper.prepared import (
    HEADS,
    HIDDEN,
    OPTIONS,
    Compiled,
    D,
    Ffn,
    Model,
    batch,
    make,
    randomised,
    rewritten,
    slots,
)


def block_norms(ffn, x):
    """[N, blocks]: the norm of what each block of hidden units adds to the output."""
    blocks = Config().ffn_blocks
    parts = zip(F.gelu(ffn.up(x)).chunk(blocks, 1), ffn.down.weight.chunk(blocks, 1), strict=True)
    return torch.stack([(units @ weight.T).norm(dim=1) for units, weight in parts], 1).detach()


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


def test_a_region_that_only_containers_hold_is_refused():
    """`nn.Sequential` calls what it holds: a module with state would be called as well."""
    model = nn.Sequential(nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, D)), nn.Tanh())
    report = sptc.prepare(model, batch(), OPTIONS)
    assert any(r.rule == "state" and "only containers" in r.reason for r in report.regions) and not slots(model)


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
