"""The loss of whole models, by rows: the number that the model gives, every gradient, and what is served from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sptc
from bench.architectures.__main__ import MODELS
from bench.architectures.build import Unbuildable
from bench.architectures.look import build, quiet
from sptc.passes.find import returned as find_returned
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor
from tests.models.zoo import CASES

WHOLE = {**FULL, "loss.logits": "drop", "objective": "memory"}  # attention and FFNs too, which leave nothing out
LOSS_ALONE = {"attention.enabled": False, "ffn.enabled": False, "loss.logits": "drop", "decline": "never"}
KEPT = {**LOSS_ALONE, "loss.logits": "keep"}

# What they have of their own between the last layer and the loss.
ARCHITECTURES = {
    "BartForConditionalGeneration": "a bias that is added",
    "BertForMaskedLM": "a head of its own, no shift",
    "CohereForCausalLM": "logits that are scaled",
    "FalconForCausalLM": "tied",
    "GPT2LMHeadModel": "tied, Conv1D before",
    "GraniteForCausalLM": "logits that are divided",
    "LlamaForCausalLM": "untied",
    "ModernBertForMaskedLM": "another head",
    "PhiForCausalLM": "a bias",
    "Qwen2ForCausalLM": "untied",
    "RecurrentGemmaForCausalLM": "a soft cap",
    "RobertaForMaskedLM": "one more head",
    "T5ForConditionalGeneration": "a scale before the head",
}
LANGUAGE = [
    name for name in MODELS.read_text().split() if name.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
]

# What a report says of the loss where it is not rewritten; empty: the model breaks its graph, and no loss is in one.
OTHERWISE = {
    "FSMTForConditionalGeneration": ["refused"],  # its logits are an input of the graph
    "ProphetNetForConditionalGeneration": ["refused"],  # logits of several tokens ahead, written into one tensor
    "JambaForCausalLM": [],
    "LongT5ForConditionalGeneration": [],
    "MambaForCausalLM": [],
    "SwitchTransformersForConditionalGeneration": [],
}
NOT_COMPARED = {
    "BigBirdForMaskedLM": "AOTAutograd gives zeros for the pooler, eager nothing",
    "GitForCausalLM": "Dynamo does not trace its loss",
    "LEDForConditionalGeneration": "its gradients are NaN in eager mode",
    "LongformerForMaskedLM": "its gradients are NaN in eager mode",
    "Qwen3NextForCausalLM": "its backward fails under aot_eager",
}


def with_labels(model: nn.Module, batch: dict[str, Tensor], counted: float) -> dict[str, Tensor]:
    """A batch whose labels count with this probability."""
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    generator = torch.Generator().manual_seed(2)
    return {**batch, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) >= counted, -100)}


def _doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in batch.items()}


def _error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest error of a gradient, as the suite's bound counts it."""
    assert got.keys() == want.keys()
    want = {n: g for n, g in want.items() if g.numel()}
    largest = max(float(g.abs().max()) for g in want.values())
    errors = {n: float((got[n].double() - g).abs().max()) for n, g in want.items()}
    return max(error / max(float(want[n].abs().max()), 1e-2 * largest) for n, error in errors.items())


def assert_equals_eager(name: str, attention: str, options: dict[str, Any] = LOSS_ALONE) -> None:
    """Three shares of labels that count through one compile; the bound of the suite, or twice eager's own error if that is more."""
    model, batch = build(name, attention)
    if getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # what it takes anyway, after a warning that breaks the graph
    reference, keep = copy.deepcopy(model).double(), options["loss.logits"] == "keep"

    def of(outputs: Any) -> Tensor:
        """The loss, and what is computed of logits outside where these are kept."""
        loss: Tensor = outputs.loss
        return loss + outputs.logits.square().mean() if keep and not loss.isnan() else loss

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=without_inductor(**options))
    for counted in (1.0, 0.3, 0.0):
        given = with_labels(model, batch, counted)
        torch.manual_seed(3)
        loss = of(compiled(**given))
        got = gradients(model, loss)
        torch.manual_seed(3)
        own_loss = of(model(**given))
        own = gradients(model, own_loss)
        torch.testing.assert_close(loss, own_loss, rtol=1e-5, atol=1e-6, equal_nan=True)
        if counted == 0:
            assert loss.isnan() and all(not g.count_nonzero() for g in got.values()) and got.keys() == own.keys()
            continue
        try:
            torch.manual_seed(3)
            want = gradients(reference, of(reference(**_doubled(given))))
        except RuntimeError:  # it mixes dtypes by itself
            want = {key: g.double() for key, g in own.items()}
        assert _error(got, want) <= max(1e-5, 2 * _error(own, want))
    rows = [r for r in sptc.report(compiled).regions if r.kind == "loss"]
    status = "refused" if keep and name == "MobileBertForMaskedLM" else "rewritten"  # it adds its bias in place
    assert [r.status for r in rows] == OTHERWISE.get(name, [status]), rows


@pytest.mark.parametrize("options", [LOSS_ALONE, KEPT], ids=["dropped", "kept"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_eager(name, options, monkeypatch):
    monkeypatch.setattr(find_returned, "_LEAST", 0)
    with quiet():
        assert_equals_eager(name, "sdpa", options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [LOSS_ALONE, KEPT], ids=["dropped", "kept"])
@pytest.mark.parametrize("name", [name for name in LANGUAGE if name not in ARCHITECTURES])
def test_every_architecture_equals_eager(name, options, monkeypatch):
    monkeypatch.setattr(find_returned, "_LEAST", 0)
    if name in NOT_COMPARED:
        pytest.skip(NOT_COMPARED[name])
    with quiet():
        try:
            assert_equals_eager(name, "eager", options)
        except (Unbuildable, ValueError) as error:
            pytest.skip(str(error))


# With all regions rewritten: none of these may be passed over.
TOGETHER = [
    *("AlbertForMaskedLM", "BioGptForCausalLM", "BloomForCausalLM", "CodeGenForCausalLM", "Cohere2ForCausalLM", "DistilBertForMaskedLM"),
    *("ElectraForMaskedLM", "Exaone4ForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM"),
    *("GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "GlmForCausalLM"),
    *("GraniteForCausalLM", "HeliumForCausalLM", "M2M100ForConditionalGeneration", "MBartForConditionalGeneration", "MistralForCausalLM"),
    *(
        "ModernBertForMaskedLM",
        "MptForCausalLM",
        "OPTForCausalLM",
        "Olmo2ForCausalLM",
        "OlmoForCausalLM",
        "PegasusForConditionalGeneration",
    ),
    *("PersimmonForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "RobertaForMaskedLM"),
    *("SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM", "T5ForConditionalGeneration", "XGLMForCausalLM"),
]
ONLY_EAGER = {"BloomForCausalLM", "CodeGenForCausalLM", "GPTJForCausalLM", "Gemma2ForCausalLM", "MptForCausalLM", "XGLMForCausalLM"}


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "LlamaForCausalLM", *(pytest.param(name, marks=pytest.mark.slow) for name in TOGETHER)]
)
def test_with_all_regions_equals_eager(name):
    with quiet():
        assert_equals_eager(name, "eager" if name in ONLY_EAGER else "sdpa", WHOLE)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["opt-sdpa-padded", "llama-sdpa-padded", "bert-eager-padded"])
def test_with_activation_checkpointing(name, adapted):
    case = CASES[name]
    model, inputs = case.make()
    model.gradient_checkpointing_enable()
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    reference = copy.deepcopy(model).double()
    want = gradients(reference, reference(**inputs).loss)
    compiled = torch.compile(model, backend=without_inductor(**LOSS_ALONE))
    assert_gradients_close(gradients(model, compiled(**inputs).loss), want)
    assert [r.status for r in sptc.report(compiled).regions if r.kind == "loss"] == ["rewritten"]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_in_16_bits(kind):
    """A model in 16 bits, loss and gradients no worse than eager mode's."""
    model, inputs = CASES["llama-sdpa-padded"].make()
    reference = copy.deepcopy(model.to(kind)).double()
    want = gradients(reference, reference(**inputs).loss)
    own = gradients(model, model(**inputs).loss)
    compiled = torch.compile(model, backend=without_inductor(**LOSS_ALONE))
    got = gradients(model, compiled(**inputs).loss)
    assert all(g.dtype == kind for g in got.values())
    assert _error(got, want) <= 1.5 * _error(own, want) + torch.finfo(kind).eps


def test_under_autocast_with_adapters_and_checkpointing():
    from peft import LoraConfig, get_peft_model

    model, inputs = CASES["llama-sdpa-padded"].make()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    reference = copy.deepcopy(model).double()
    want = gradients(reference, reference(**inputs).loss)
    compiled = torch.compile(model, backend=without_inductor(**LOSS_ALONE))
    with torch.autocast("cpu", torch.bfloat16):
        own, got = (gradients(model, call(**inputs).loss) for call in (model, compiled))
    assert [r.status for r in sptc.report(compiled).regions if r.kind == "loss"] == ["rewritten"]
    assert _error(got, want) <= 1.5 * _error(own, want) + 2**-8


def test_what_is_trained_is_served_dense():
    """Training without logits moves the parameters as training with them does, and evaluation has its logits."""
    model, inputs = CASES["llama-sdpa"].make()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend=without_inductor(**LOSS_ALONE))
    for call, moving in ((compiled, model), (other, other)):
        optimizer = torch.optim.SGD(moving.parameters(), lr=1e-1)
        for _ in range(4):
            optimizer.zero_grad()
            call(**inputs).loss.backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(**inputs).logits, other.eval()(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_number_of_items_in_the_batch():
    """As Trainer gives it: the sum over all that is accumulated, divided by a tensor."""
    model, inputs = CASES["llama-sdpa"].make()
    reference = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=without_inductor(**LOSS_ALONE))
    for items in (torch.tensor(50), torch.tensor(70)):
        want = gradients(reference, reference(**inputs, num_items_in_batch=items).loss)
        assert_gradients_close(gradients(model, compiled(**inputs, num_items_in_batch=items).loss), want)
    assert [r.status for r in sptc.report(compiled).regions if r.kind == "loss"] == ["rewritten"]


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_needs_nothing(bf16, tmp_path):
    """It trains without logits, under mixed precision too, and has them in evaluation."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    case = CASES["llama-sdpa"]
    rows = [{"input_ids": row, "labels": row} for row in case.make()[1]["input_ids"].repeat(2, 1)]
    moved, predictions, statuses = [], [], []
    for options in (LOSS_ALONE, {**LOSS_ALONE, "loss.enabled": False}):
        torch._dynamo.reset()
        model, _ = case.make()
        model.compile(backend=without_inductor(**options))
        arguments = TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=2, per_device_eval_batch_size=2, use_cpu=True, bf16=bf16, report_to="none"
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        moved.append([p.detach().clone() for p in model.parameters()])
        predictions.append(torch.from_numpy(trainer.predict(rows).predictions))
        statuses.append({r.status for r in sptc.report(model).regions if r.kind == "loss"})  # evaluation's graph has no gradients
    assert statuses == [{"rewritten", "declined"}, {"declined"}]
    assert predictions[0].shape[-1] == model.config.vocab_size
    tolerance = 2e-3 if bf16 else 1e-4
    for a, b in zip(moved[0], moved[1], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(predictions[0], predictions[1], rtol=30 * tolerance, atol=30 * tolerance)
