"""One line trains sparse, and what is saved is plain PEFT's: the adapter has its keys, loads without sptc, and is served dense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import sptc
from tests.models.compiled import assert_gradients_close, gradients, without_inductor
from tests.models.zoo import CASES

OPTIONS = {"decline": "never", "attention.density": 0.125, "ffn.context_density": 0.25}


def adapted() -> tuple[Any, dict[str, Tensor]]:
    """A llama with an adapter, and a batch in which half of the tokens count."""
    model, inputs = CASES["llama-sdpa-padded"].make()
    labels = inputs["labels"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train(), {**inputs, "labels": labels}


def test_the_adapter_is_plain_pefts_and_is_served_dense(tmp_path: Any) -> None:
    model, inputs = adapted()
    base, twin = copy.deepcopy(model), copy.deepcopy(model)
    names = set(model.state_dict())
    compiled = torch.compile(model, backend=without_inductor(**OPTIONS, **{"loss.logits": "drop"}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = compiled(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert {r.status for r in sptc.report(compiled).regions} == {"rewritten"} and losses[-1] < losses[0]
    assert set(model.state_dict()) == names

    for saved, folder in ((model, tmp_path / "sparse"), (twin, tmp_path / "dense")):
        saved.save_pretrained(folder)
    keys = [load_file(folder / "adapter_model.safetensors").keys() for folder in (tmp_path / "sparse", tmp_path / "dense")]
    assert keys[0] == keys[1]
    served = PeftModel.from_pretrained(base.unload(), tmp_path / "sparse").eval()
    with torch.no_grad():
        want = served(**inputs).logits
        compiled.eval()
        torch.testing.assert_close(compiled(**inputs).logits, want)  # evaluated dense here too, with labels
        torch.testing.assert_close(compiled(**{k: v for k, v in inputs.items() if k != "labels"}).logits, want)  # or without


def test_a_reference_without_its_adapter_is_the_base_model() -> None:
    model, inputs = adapted()
    with torch.no_grad():
        want = copy.deepcopy(model).unload()(**inputs).logits
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
        compiled = torch.compile(model, backend=without_inductor(**OPTIONS))
        with model.disable_adapter():
            torch.testing.assert_close(compiled(**inputs).logits, want)


def test_a_prepared_model_without_its_adapter_is_the_base_model() -> None:
    """What the paper's recipe trains beside the adapter is no part of the base model either."""
    model, inputs = adapted()
    want = copy.deepcopy(model).unload()(**inputs).logits.detach()
    options = {"decline": "never", "ffn.selector": "router", "attention.selector": "pq"}
    sptc.prepare(model, inputs, options)
    compiled = torch.compile(model, backend=without_inductor(**options))
    with torch.no_grad():
        assert not torch.allclose(compiled(**inputs).logits, want)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(**inputs).logits, want)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_inductor_computes_what_the_graph_says_whatever_counts(checkpointed: bool) -> None:
    """The counts are data: one compile serves them all."""
    model, inputs = adapted()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # transformers' hook for it breaks the graph, and only reentrant checkpoints need it
    reference = torch.compile(copy.deepcopy(model), backend=without_inductor(**OPTIONS))
    compiled = torch.compile(model, backend="spt", options=OPTIONS)
    for first in (1, 9, 14):
        labels = inputs["labels"].masked_fill(torch.arange(inputs["labels"].shape[1]) < first, -100)
        batch = {**inputs, "labels": labels}
        results = [gradients(m._orig_mod, m(**batch).loss) for m in (compiled, reference)]
        assert_gradients_close(*results, tolerance=1e-4)
    assert sptc.report(compiled).graphs == 1
