"""Adapters of PEFT: which are part of a region, which are refused and why, and that all of them train right."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import sptc
from tests.stack.loop import loop
from tests.stack.matrix import Cell, Run, check, rows
from tests.stack.models import adapted, batch, llama, lora
from tests.stack.results import record


def with_lora(run: Run, **fields: Any) -> None:
    model = run.train(lora(llama(), **fields))
    run.compile_in_place(model)
    loop(run, model)


def with_config(run: Run, config: Any) -> None:
    model = run.train(adapted(llama(), config))
    run.compile_in_place(model)
    loop(run, model)


def two_adapters(run: Run) -> None:
    """The second adapter is added, set and trained on the compiled model; the first one stays as it is and can be set again."""
    model = lora(llama())
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("second")
    first = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    torch.manual_seed(4)
    for name, p in model.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(p, std=0.05)
    run.train(model)
    run.compile_in_place(model)
    loop(run, model)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters() if name in first)
    if run.sparse:
        model.set_adapter("default")
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            want = model(**batch()).logits
        with torch.no_grad():
            torch.testing.assert_close(model(**batch()).logits, want)
        model.set_adapter("second")
        model.train()


def merged(run: Run) -> None:
    """`merge_and_unload` after training: plain layers, the same predictions, no trace of sptc."""
    model = run.train(lora(llama()))
    run.compile_in_place(model)
    loop(run, model)
    run.report = sptc.report(model)
    inputs = batch()
    with torch.no_grad():
        want = model.eval()(**inputs).logits
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(**inputs).logits, want)
    assert plain.state_dict().keys() == llama().state_dict().keys()
    assert type(plain) is type(llama())


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["up_proj", "down_proj", "gate_proj"]
DENSE_FFN = {"attention": 2}
LAYER_BY_LAYER = {"attention": 1}  # one graph serves both layers


def tuner(name: str, config: Any, says: str, compiles: int = 1) -> Cell:
    """A way to adapt that changes FFNs so that they are refused; attention between them is rewritten."""
    return Cell(name, partial(with_config, config=config), compiles, DENSE_FFN, {"ffn": says})


def causal(kind: str, **fields: Any) -> Any:
    return getattr(peft, kind + "Config")(task_type="CAUSAL_LM", **fields)


ADALORA = causal("AdaLora", target_modules="all-linear", init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1)
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight", "mlp.down_proj.weight"]}

CELLS = (
    Cell("LoRA on all linear layers", with_lora, fast=True),
    Cell("LoRA on attention only", partial(with_lora, target_modules=ATTENTION)),
    Cell("LoRA on FFNs only", partial(with_lora, target_modules=MLP)),
    Cell("rsLoRA", partial(with_lora, use_rslora=True)),
    Cell("modules_to_save: the head", partial(with_lora, modules_to_save=["lm_head"])),
    Cell("LoRA on embeddings", partial(with_lora, target_modules=["embed_tokens", "q_proj", *MLP])),
    Cell("LoRA dropout", partial(with_lora, lora_dropout=0.2)),
    Cell("two adapters, set_adapter", two_adapters, compiles=2),
    Cell("merge_and_unload", merged, compiles=2, fast=True),
    Cell("prompt tuning", partial(with_config, config=causal("PromptTuning", num_virtual_tokens=3))),
    Cell("prefix tuning", partial(with_config, config=causal("PrefixTuning", num_virtual_tokens=3))),
    tuner(
        "LoRA with biases (lora_bias)", peft.LoraConfig(r=4, target_modules="all-linear", lora_bias=True), "is computed by no projection"
    ),
    tuner("IA3", causal("IA3"), "is computed by no projection"),
    tuner("AdaLoRA", ADALORA, "is computed by no projection"),
    tuner("OFT", causal("OFT", target_modules="all-linear", oft_block_size=4), "one of 16 matrices for each row"),
    tuner("VeRA", causal("Vera", target_modules=["up_proj", "gate_proj"]), "a parameter of its own inside the activation"),
    Cell("LoHa", partial(with_config, config=causal("LoHa", target_modules=MLP, r=2)), 16, LAYER_BY_LAYER, {"break": "Data-dependent"}),
    Cell("DoRA", partial(with_lora, use_dora=True), 32, LAYER_BY_LAYER, {"break": "Unsupported"}),
    Cell("target_parameters", partial(with_lora, **EXPERTS), 16, DENSE_FFN, {"break": "parametrize", "note": "recompile_limit"}),
)


@pytest.mark.parametrize("cell", rows("PEFT", CELLS))
def test_peft(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    record(record_property, check(cell, tmp_path))
