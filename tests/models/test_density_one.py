"""The anchor: with every key and every block kept, a rewritten model equals the dense one, in its loss and in every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sptc
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.models.zoo import CASES, Case


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _assert_equals_dense(case: Case, model: nn.Module, inputs: dict[str, Any]) -> Any:
    """fp32 through the passes against fp64 eager; returns the compiled model."""
    reference = copy.deepcopy(model).double()
    if hasattr(reference, "set_attn_implementation"):
        reference.set_attn_implementation(case.exact)
    dense = case.loss(reference(**_double(inputs)))
    want = gradients(reference, dense)
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    loss = case.loss(compiled(**inputs))
    torch.testing.assert_close(float(loss), float(dense), rtol=1e-5, atol=1e-6)  # transformers computes the loss itself in fp32
    assert_gradients_close(gradients(model, loss), want)
    return compiled


def _assert_all_rewritten(case: Case, compiled: Any) -> None:
    regions = sptc.report(compiled).regions
    # The head of BERT has a layer norm inside.
    status = [(r.kind, r.status) for r in regions if r.kind != "loss" and r.rule != "activation"]
    assert sorted(status) == [("attention", "rewritten")] * len(case.attention) + [("ffn", "rewritten")] * case.ffn, regions


@pytest.mark.parametrize("name", CASES)
def test_equals_dense(name):
    case = CASES[name]
    model, inputs = case.make()
    _assert_all_rewritten(case, _assert_equals_dense(case, model, inputs))


@pytest.mark.parametrize("name", ["gemma2-eager", "gpt_oss-eager"])
def test_bfloat16_is_as_exact_as_eager(name):
    case = CASES[name]
    model, inputs = case.make()
    model = model.bfloat16()
    reference = copy.deepcopy(model).double()
    want = gradients(reference, case.loss(reference(**_double(inputs))))
    eager = gradients(model, case.loss(model(**inputs)))
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    got = gradients(model, case.loss(compiled(**inputs)))
    _assert_all_rewritten(case, compiled)
    assert got.keys() == want.keys()
    for parameter, truth in want.items():
        off, allowed = (float((grads[parameter].double() - truth).norm()) for grads in (got, eager))
        assert off <= 1.5 * allowed + 1e-3 * float(truth.norm()), (parameter, off, allowed)


@pytest.mark.parametrize(
    "name", ["opt-sdpa-padded", "llama-eager-padded", "gpt2-sdpa", "bert-sdpa-padded", "gemma2-eager", "gpt_oss-eager-padded"]
)
def test_equals_dense_with_activation_checkpointing(name):
    case = CASES[name]
    model, inputs = case.make()
    model.gradient_checkpointing_enable()
    _assert_all_rewritten(case, _assert_equals_dense(case, model, inputs))


@pytest.mark.parametrize("name", ["opt-sdpa", "llama-sdpa-padded", "gpt2-sdpa", "bert-eager-padded"])
def test_equals_dense_with_lora(name):
    from peft import LoraConfig, get_peft_model

    case = CASES[name]
    model, inputs = case.make()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    _assert_equals_dense(case, model, inputs)


@pytest.mark.parametrize("name", ["llama-sdpa-padded", "encoder-pre"])
def test_parameters_move_the_same(name):
    case = CASES[name]
    model, inputs = case.make()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    for call, moving in ((reference, reference), (compiled, model)):
        optimizer = torch.optim.SGD(moving.parameters(), lr=1e-2)  # moves that the rounding of a parameter does not hide
        for _ in range(4):
            optimizer.zero_grad()
            case.loss(call(**inputs)).backward()
            optimizer.step()
    start = dict(case.make()[0].named_parameters())
    moved = {name: p.detach() - start[name].detach() for name, p in reference.named_parameters()}
    assert max(float(m.abs().max()) for m in moved.values()) > 1e-5
    assert_gradients_close({n: p.detach() - start[n].detach() for n, p in model.named_parameters()}, moved, 1e-4)


@pytest.mark.parametrize("name", ["opt-sdpa-padded", "llama-sdpa"])
def test_lengths_share_a_symbolic_graph(name):
    """From the second length on one graph serves all lengths, and each equals dense."""
    case = CASES[name]
    model, inputs = case.make()
    compiled = torch.compile(model, backend=without_inductor(**FULL))
    for n in (19, 13, 11, 17):
        cut = {k: v[:, :n].clone() for k, v in inputs.items()}
        want = gradients(model, case.loss(model(**cut)))
        assert_gradients_close(gradients(model, case.loss(compiled(**cut))), want, 2e-5)
    assert sptc.report(compiled).graphs == 2
