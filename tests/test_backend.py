"""The backend as a user calls it: options, errors, dropout, autocast, and one compile by Inductor."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import sptc
from sptc.backend import compile_graph
from sptc.config import Config, ConfigError
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.models.zoo import CASES

SPARSE = {"decline": "never", "attention.density": 0.5, "ffn.density": 0.5, "attention.query_block": 4, "attention.key_block": 4}
ROUTER = {**SPARSE, "ffn.selector": "router"}


class Block(nn.Module):
    """Causal attention and an FFN, with dropout in both."""

    def __init__(self, width=32, heads=4, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.dropout(F.gelu(self.up(x)), self.dropout, self.training))


def _block(**kwargs):
    torch.manual_seed(0)
    return Block(**kwargs), torch.randn(2, 19, 32)


def _fails(model, x, **kwargs):
    with pytest.raises(BackendCompilerFailed) as error:
        torch.compile(model, backend="spt", **kwargs)(x)
    return error.value.inner_exception


def test_inductor_equals_dense_at_density_one():
    model, x = _block()
    want = gradients(model, model(x).square().mean())
    compiled = torch.compile(model, backend="spt", options=FULL)
    got = gradients(model, compiled(x).square().mean())
    assert_gradients_close(got, want)
    assert [(r.kind, r.status) for r in sptc.report(compiled).regions] == [("attention", "rewritten"), ("ffn", "rewritten")]


def test_inductor_options_reach_inductor():
    model, x = _block()
    error = _fails(model, x, options={"inductor": {"no_such_setting": 1}})
    assert "no_such_setting" in str(error)


def test_wrong_options_say_what_fits():
    model, x = _block()
    error = _fails(model, x, options={"ffn.densty": 0.5})
    assert isinstance(error, ConfigError) and "did you mean 'ffn.density'" in str(error)
    error = _fails(model, x, mode="max-autotune")
    assert isinstance(error, ConfigError) and "mode='max-autotune'" in str(error) and "options={'inductor'" in str(error)


def test_a_device_without_kernels():
    model, x = _block()
    error = _fails(model.to("meta"), x.to("meta"))
    assert isinstance(error, ConfigError) and "no kernels for device 'meta'" in str(error)


class Counting(nn.Module):
    """flex_attention, whose block mask can't be traced again, and a buffer changed by methods, which no pass may take for dead code."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("count", torch.zeros(2))
        self.mask = mask

    def forward(self, q):
        self.count.add_(1)
        self.count.mul_(2)
        return torch.nn.attention.flex_attention.flex_attention(q, q, q, block_mask=self.mask)


def test_a_graph_that_cannot_be_traced_again_runs_as_captured():
    from torch.nn.attention.flex_attention import create_block_mask

    model = Counting(create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu"))
    compiled = torch.compile(model, backend=without_inductor(**SPARSE))
    q = torch.randn(1, 2, 128, 16)
    torch.testing.assert_close(compiled(q), F.scaled_dot_product_attention(q, q, q, is_causal=True), rtol=1e-4, atol=1e-5)
    assert model.count.tolist() == [2, 2]
    assert {(r.kind, r.status, r.rule) for r in sptc.report(compiled).regions} == {("graph", "refused", "higher-order")}


@torch._dynamo.allow_in_graph
def shifted(x):
    x.data.add_(1)
    return x * 2


class Hiding(Block):
    """A function that Dynamo does not look into, and that does what no tracer sees."""

    def forward(self, x):
        return super().forward(shifted(x))


def test_what_cannot_be_traced_again_goes_to_inductor_with_a_warning(caplog):
    torch._logging.warning_once.cache_clear()
    model, x = Hiding(), torch.randn(2, 19, 32)
    want = gradients(model, model(x.clone()).square().mean())
    with caplog.at_level(logging.WARNING, "sptc"):
        compiled = torch.compile(model, backend=without_inductor(**SPARSE))
        got = gradients(model, compiled(x.clone()).square().mean())
    assert_gradients_close(got, want)
    (said,) = [r.getMessage() for r in caplog.records if "traced" in r.getMessage()]
    assert said.startswith("test_backend.py:") and "add_" in said and said.endswith("Inductor compiles it as it was captured")
    assert [(r.kind, r.status, r.rule) for r in sptc.report(compiled).regions] == [("graph", "refused", "untraceable")]
    assert [(r.kind, r.status, r.rule) for r in sptc.explain(model, x, SPARSE).regions] == [("graph", "refused", "untraceable")]


def test_what_cannot_be_traced_again_raises_if_asked():
    with pytest.raises(BackendCompilerFailed, match="out of sight of the tracer"):
        torch.compile(Hiding(), backend=without_inductor(**SPARSE, on_error="raise"))(torch.randn(2, 19, 32))


def test_a_failed_trace_leaves_no_mode_behind():
    def program(x):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return shifted(x) @ x

    torch.compile(program, backend=without_inductor(**SPARSE))(torch.randn(8, 8))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_graph_with_nothing_for_us_is_compiled_as_it_was_captured():
    captured, compiled = [], []

    def backend(gm, example_inputs):
        def inner(g, inputs, _):
            compiled.append(g)
            return g.forward

        captured.append(gm)
        return compile_graph(gm, example_inputs, Config(), inner=inner)

    model, x = _block()
    torch.compile(model, backend=backend)(x)  # its regions would not pay
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    torch.compile(optimizer.step, backend=backend)()
    assert len(captured) == len(compiled) > 1 and all(a is b for a, b in zip(captured, compiled, strict=True))


def test_hooks_of_saved_tensors_see_none_of_what_is_traced():
    model, x = _block()
    want = gradients(model, model(x).square().mean())
    compiled, seen = torch.compile(model, backend=without_inductor(**FULL)), []

    def pack(saved):
        assert type(saved) in (torch.Tensor, nn.Parameter)
        seen.append(saved.data_ptr())  # which a fake has not
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = compiled(x)
    assert_gradients_close(gradients(model, y.square().mean()), want)
    assert seen and [r.status for r in sptc.report(compiled).regions] == ["rewritten", "rewritten"]


class Flat(nn.Module):
    """The up projection over flat tokens, the down projection over [b, n]."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        b, n, d = x.shape
        return self.down(F.gelu(self.up(x.view(-1, d))).view(b, n, 64))


def test_symbolic_batch_and_length():
    model, x = Flat(), torch.randn(3, 7, 32)
    compiled = torch.compile(model, backend=without_inductor(**FULL), dynamic=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]


@pytest.mark.parametrize(("least", "attention"), [(8, "declined"), (9, "rewritten")])
def test_sparse_forms_keep_the_range_that_the_user_marked(least, attention):
    """With 8 keys a list holds a single block, and torch compiles sizes of 1 apart."""
    model, x = _block()
    torch._dynamo.mark_dynamic(x, 1, min=least, max=4096)
    compiled = torch.compile(model, backend=without_inductor(**SPARSE))
    want = gradients(model, compiled(x).square().mean())
    assert want.keys() == dict(model.named_parameters()).keys()
    assert [r.status for r in sptc.report(compiled).regions] == [attention, "rewritten"]


def test_symbolic_lora_scaling():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], init_lora_weights=False), Flat())
    x = torch.randn(3, 7, 32)
    compiled = torch.compile(model, backend=without_inductor(**FULL), dynamic=True)
    want = gradients(model, model(x).square().mean())
    assert_gradients_close(gradients(model, compiled(x).square().mean()), want)
    assert [r.status for r in sptc.report(compiled).regions] == ["rewritten"]


def test_the_router_is_single_precision_however_autocast_is_spelled():
    inner = Flat()

    def within(x):
        with torch.autocast("cpu", torch.bfloat16):
            return inner(x)

    seen = []

    def backend(gm, example_inputs):
        from sptc.backend import compile_graph
        from sptc.config import Config

        def keep(g, inputs, _):
            seen.append(g)
            return g.forward

        return compile_graph(
            gm, example_inputs, Config.from_options({**SPARSE, "ffn.selector": "router", "attention.enabled": False}), inner=keep
        )

    torch.compile(within, backend=backend)(torch.randn(2, 8, 32))
    (route,) = seen[0].graph.find_nodes(op="call_function", target=torch.ops.sptc.route.default)
    assert route.args[0].target is torch.ops.aten.to.dtype and route.args[0].args[1] is torch.float32


def test_kernels_refuse_double_precision_and_libraries_do_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, x = _block()
    model.double()
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    torch.testing.assert_close(compiled(x.double()), model(x.double()))
    found = {r.kind: (r.status, r.rule) for r in sptc.report(compiled).regions}
    assert found == {"attention": ("refused", "dtype"), "ffn": ("rewritten", None)}


def test_attention_of_two_dtypes_is_refused():
    def attend(q, v):
        return torch.softmax(q @ q.mT / 8, -1).to(v.dtype) @ v

    q, v = torch.randn(1, 4, 19, 8), torch.randn(1, 4, 19, 8, dtype=torch.bfloat16)
    compiled = torch.compile(attend, backend=without_inductor(**SPARSE))
    torch.testing.assert_close(compiled(q, v), attend(q, v), rtol=0, atol=0)
    assert [(r.kind, r.status, r.rule) for r in sptc.report(compiled).regions] == [("attention", "refused", "dtype")]


def test_nothing_enabled_is_dense():
    model, x = _block()
    compiled = torch.compile(model, backend=without_inductor(**{"attention.enabled": False, "ffn.enabled": False, "decline": "never"}))
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert [(r.status, r.reason) for r in sptc.report(compiled).regions] == [
        ("declined", "option 'attention.enabled' is False"),
        ("declined", "option 'ffn.enabled' is False"),
    ]


def test_an_unprepared_model_says_once_what_prepare_adds(caplog):
    torch._logging.warning_once.cache_clear()
    model, x = _block()
    with caplog.at_level(logging.WARNING, "sptc"):
        for length in (19, 18):
            torch._dynamo.reset()
            torch.compile(model, backend=without_inductor(**SPARSE, **{"attention.selector": "pq", "ffn.selector": "router"}))(
                x[:, :length]
            )
    said = [r.getMessage() for r in caplog.records if "sptc.prepare" in r.getMessage()]
    assert len(said) == 2 and "codebooks" in said[0] and "routers" in said[1]


def test_small_regions_are_declined_with_both_figures():
    model, x = _block()
    compiled = torch.compile(model, backend=without_inductor())
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    for region in sptc.report(compiled).regions:
        assert region.status == "declined" and region.reason.startswith("would not pay: ")
        assert region.seconds_sparse > region.seconds_dense > 0


def test_sparse_is_another_function_with_every_gradient():
    model, x = _block()
    compiled = torch.compile(model, backend=without_inductor(**SPARSE))
    y = compiled(x)
    got = gradients(model, y.square().mean())
    assert got.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in got.values())
    assert not torch.allclose(y, model(x), rtol=1e-2)


def test_a_failure_raises_unless_dense_was_asked_for(monkeypatch, caplog):
    def broken(unit):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("sptc.backend.ANALYSIS", ((broken, "fails"),))
    model, x = _block()
    with pytest.raises(BackendCompilerFailed, match="a bug of ours"):
        torch.compile(model, backend=without_inductor())(x)
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "sptc"):
        y = torch.compile(model, backend=without_inductor(on_error="dense"))(x)
    torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    assert "leaves it dense" in caplog.text and "a bug of ours" in caplog.text


def test_dense_was_asked_for_covers_the_measurement_of_the_device(monkeypatch, caplog, tmp_path):
    def broken(*_):
        raise OSError("no clock")

    monkeypatch.setattr("sptc.backend.calibrate", broken)
    model, x = _block()
    with pytest.raises(BackendCompilerFailed, match="no clock"):
        torch.compile(model, backend=without_inductor())(x)
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "sptc"):
        y = torch.compile(model, backend=without_inductor(on_error="dense", dump=str(tmp_path / "dump")))(x)
    torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    assert "leaves it dense" in caplog.text and "no clock" in caplog.text and (tmp_path / "dump" / "graph0" / "report.txt").exists()
    torch._dynamo.reset()
    (tmp_path / "file").touch()
    with pytest.raises(BackendCompilerFailed, match="option 'dump': cannot write"):  # a wrong option is no unexpected failure
        torch.compile(model, backend=without_inductor(on_error="dense", dump=str(tmp_path / "file")))(x)


def test_dense_does_not_hide_a_device_without_kernels():
    model, x = _block()
    with pytest.raises(BackendCompilerFailed, match="no kernels for device 'meta'"):
        torch.compile(model.to("meta"), backend=without_inductor(on_error="dense"))(x.to("meta"))


def test_dropout_draws_anew_in_training_and_not_in_evaluation():
    model, x = _block(dropout=0.3)
    compiled = torch.compile(model, backend=without_inductor(**SPARSE))
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    again = compiled(x)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert (first != second).any()
    model.eval()
    torch.testing.assert_close(compiled(x), compiled(x), rtol=0, atol=0)


def test_autocast_casts_as_dense_does():
    model, x = _block()
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(x), compiled(x)
        exact = model.double()(x.double())
    assert got.dtype == want.dtype
    model.float()
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()


@pytest.mark.parametrize("name", ["gpt2-eager", "bert-sdpa-padded", "mistral-sdpa"])
def test_models_train_sparse(name):
    case = CASES[name]
    model, inputs = case.make(dropout=0.1)
    compiled = torch.compile(model, backend=without_inductor(**SPARSE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = case.loss(compiled(**inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
