"""PEFT: state that is part of an adapter, saved, loaded, taken away and merged with it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open

import sptc
from sptc.paper.adapter import AdapterError
from sptc.paper.state import owners
from tests.paper.prepared import OPTIONS, Compiled, Model, adapted, batch, make, randomised, rewritten, slots


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
