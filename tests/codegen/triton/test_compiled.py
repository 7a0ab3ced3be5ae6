"""Whole models through `torch.compile(backend="spt")` on emitted kernels, interpreted: loss, every gradient, and what was emitted."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from torch.testing import FileCheck

import sptc
import sptc.backend
from sptc.codegen.triton.run.launch import recorded
from tests.models import zoo
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor

# The model's mask in the attention kernels.
MODELS = {
    "llama-sdpa-padded": ["k <= q", "t0[b, k]"],
    "opt-sdpa": ["k <= q"],
    "gpt2-sdpa": ["k <= q"],
    "bert-sdpa-padded": ["t0[b, k]"],
}


@pytest.fixture(autouse=True)
def one_layer(monkeypatch):
    monkeypatch.setattr(zoo, "LAYERS", 1)
    monkeypatch.setattr(zoo, "LENGTH", 19)


@contextmanager
def interpreted():
    """Run emitted kernels in Triton's interpreter; yields what is launched."""
    with pytest.MonkeyPatch.context() as patch, recorded(run=True) as launches:
        patch.setenv("TRITON_INTERPRET", "1")
        yield launches


@pytest.mark.parametrize("name", MODELS)
def test_density_one_equals_eager(name, tmp_path, monkeypatch):
    case, emitted = zoo.CASES[name], []
    emit = sptc.backend.emit
    monkeypatch.setattr(sptc.backend, "emit", lambda *args: emitted.extend(found := emit(*args)) or found)
    model, inputs = case.make()
    reference = copy.deepcopy(model)
    dense = case.loss(reference(**inputs))
    want = gradients(reference, dense)
    with interpreted() as launches:
        compiled = torch.compile(model, backend=without_inductor(**{**FULL, "ffn.selector": "router"}, dump=str(tmp_path)))
        loss = case.loss(compiled(**inputs))
        got = gradients(model, loss)
    assert [r.status for r in sptc.report(compiled).regions if r.rule != "activation" and r.kind != "loss"] == ["rewritten"] * 2
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-6)
    assert_gradients_close(got, want, 2e-5)
    assert {kernel.spec for kernel in emitted} == {launch.spec for launch in launches}, "what runs was emitted by the compile"
    _check_dump(tmp_path / "graph0" / "kernels", MODELS[name])


def _check_dump(folder, masks):
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    for name, text in texts.items():
        compile(text, name, "exec")
        assert re.search(r"^# for \S+\.0\b\S* \(modeling_\w+\.py:\d+\): sptc::", text, re.MULTILINE), "its region and the source line"
        assert "constexpr" not in text.split("@triton.jit")[-1].split("):")[0], "constants are bound"
    for name in ("attention_forward.py", "attention_backward_q.py", "attention_backward_kv.py"):
        for mask in masks:
            FileCheck().check("# predicate: ").check_same(mask).check("def allowed").check(mask).run(texts[name])


def test_prepared_model_computes_as_on_a_cpu(monkeypatch):
    """Half of everything, chosen by codebooks and trained routers: kernels and CPU code choose and compute alike."""
    monkeypatch.setattr(zoo, "BATCH", 1)
    case = zoo.CASES["llama-sdpa"]
    model, inputs = case.make()
    options = {**FULL, "attention.selector": "pq", "ffn.selector": "router", "attention.density": 0.5, "ffn.density": 0.5, "ffn.blocks": 4}
    sptc.prepare(model, inputs, options)
    results = []
    for run in (contextmanager(lambda: (yield [])), interpreted):
        twin = copy.deepcopy(model)
        with run() as launches:
            loss = case.loss(torch.compile(twin, backend=without_inductor(**options))(**inputs))
            results.append((loss.detach(), gradients(twin, loss), dict(twin.named_buffers())))
        torch._dynamo.reset()
    assert {"encode_histogram", "code_statistics"} <= {launch.spec.template for launch in launches}
    (want_loss, want, want_buffers), (loss, got, buffers) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-6)
    assert any("spt" in name for name in want)
    assert_gradients_close(got, want, 2e-5)
    torch.testing.assert_close(buffers, want_buffers, rtol=1e-5, atol=1e-5)
