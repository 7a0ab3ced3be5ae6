"""Tiny models with inputs, and what is to be found in them: for every test that takes whole models.

    case = CASES["llama-sdpa-padded"]
    model, inputs = case.make()
    case.loss(model(**inputs)).backward()

All are fp32 on the CPU, in train mode, seeded, without dropout unless asked for, two layers, batch 2, odd lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.gpt import Gpt

VOCABULARY, WIDTH, HIDDEN, HEADS, KEY_HEADS, LAYERS = 99, 32, 64, 4, 2, 2
BATCH, LENGTH, MEMORY, WINDOW = 2, 19, 11, 7
DOCUMENTS = ((8, 11), (5, 14))  # lengths of the documents packed into each row

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model and its inputs."""

    name: str
    build: Callable[[float], nn.Module]  # from the dropout probability
    inputs: Callable[[], Inputs]
    loss: Callable[[Any], Tensor]
    attention: tuple[str, ...]  # predicate of each attention region, in the order of the model
    ffn: int  # number of FFN regions
    exact: str = "sdpa"  # the attention of transformers in fp64; "eager" computes most models' softmax in fp32, whatever their dtype

    def make(self, dropout: float = 0.0, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """A new model in train mode, and its inputs."""
        torch.manual_seed(seed)
        model = self.build(dropout).train()
        for module in model.modules():
            # OPT of transformers 5.17 in training branches on a random number before each layer, which no graph can hold, even where its
            # `layerdrop` is 0; 5.23 does not. What is in train mode below it stays so.
            if getattr(module, "layerdrop", None) == 0:
                module.training = False
        return model, self.inputs()


def padding() -> Tensor:
    """An attention mask [b, n] of ones and zeros, padded on the left in one row and on the right in the other."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 13:] = 0
    mask[1, :4] = 0
    return mask


def documents() -> Tensor:
    """Positions [b, n] that start again at each packed document."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])


def _token_inputs(padded: bool = False, packed: bool = False, **more: Any) -> Inputs:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    inputs: Inputs = {"input_ids": ids, "labels": ids.clone(), **more}
    if padded:
        inputs["attention_mask"] = padding()
        # No loss from padding: neither as a token nor as the position that predicts the next token, since what a row without keys
        # attends to is anyone's choice (zeros, or an average over everything).
        seen = padding() != 0
        inputs["labels"] = ids.masked_fill(~(seen & seen.roll(1, 1)), -100)
    if packed:
        inputs["position_ids"] = documents()
    return inputs


def _hugging_face(family: str, attention: str, dropout: float, **options: Any) -> nn.Module:
    import transformers

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 64}
    gated = {**sizes, "intermediate_size": HIDDEN, "num_key_value_heads": KEY_HEADS, "attention_dropout": dropout}
    families: Mapping[str, tuple[str, str, Inputs]] = {
        "opt": ("OPTConfig", "OPTForCausalLM", {**sizes, "ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH, "dropout": dropout}),
        "llama": ("LlamaConfig", "LlamaForCausalLM", gated),
        "mistral": ("MistralConfig", "MistralForCausalLM", {**gated, "sliding_window": WINDOW}),
        "gemma2": (
            "Gemma2Config",
            "Gemma2ForCausalLM",  # a cap so low that scores of random weights come near it
            {**gated, "head_dim": 8, "query_pre_attn_scalar": 1, "sliding_window": WINDOW, "attn_logit_softcapping": 0.05},
        ),
        "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**gated, "head_dim": 8, "sliding_window": WINDOW}),
        "bert": ("BertConfig", "BertForMaskedLM", {**sizes, "intermediate_size": HIDDEN, "hidden_dropout_prob": dropout}),
        "gpt2": (
            "GPT2Config",
            "GPT2LMHeadModel",  # a warning breaks its graph before the loss: two graphs
            {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64},
        ),
    }
    config_name, model_name, fields = families[family]
    dropouts = {
        "opt": ("attention_dropout",),
        "bert": ("attention_probs_dropout_prob",),
        "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    }
    fields = {**fields, **dict.fromkeys(dropouts.get(family, ()), dropout)}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    caches = {} if family == "bert" else {"use_cache": False}
    config = getattr(transformers, config_name)(**{**tokens, **caches, **fields, **options, "attn_implementation": attention})
    return getattr(transformers, model_name)(config)


class _Ungated(nn.Module):
    """An FFN in the place of experts, which no pass rewrites and which have no fp64 form."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(nn.functional.gelu(self.up(x))), None


def _with_sinks(dropout: float) -> nn.Module:
    model = _hugging_face("gpt_oss", "eager", dropout)
    for layer in model.model.layers:
        layer.mlp = _Ungated()
        nn.init.normal_(layer.self_attn.sinks)
    return model


def _language_cases() -> list[Case]:
    causal, seen = "k <= q", "t0[b, k] != 0"
    window = f"(k > (q - {WINDOW})) & ({causal})"
    masks = {"opt": causal, "llama": causal, "mistral": window, "gpt2": causal, "bert": "True"}
    cases = []
    for family, mask in masks.items():
        for attention in ("sdpa", "eager"):
            for padded in (False, True):
                both = seen if mask == "True" else f"({mask}) & ({seen})"
                cases.append(
                    Case(
                        f"{family}-{attention}" + ("-padded" if padded else ""),
                        partial(_hugging_face, family, attention),
                        partial(_token_inputs, padded),
                        lambda output: output.loss,
                        (both if padded else mask,) * LAYERS,
                        LAYERS,
                    )
                )
    capped = partial(_hugging_face, "gemma2", "eager")  # "sdpa" leaves the cap out
    cases.append(Case("gemma2-eager", capped, _token_inputs, lambda output: output.loss, (window, causal), LAYERS, exact="eager"))
    for padded in (False, True):
        both = tuple(f"({mask}) & ({seen})" if padded else mask for mask in (window, causal))
        name, inputs = "gpt_oss-eager" + ("-padded" if padded else ""), partial(_token_inputs, padded)
        cases.append(Case(name, _with_sinks, inputs, lambda output: output.loss, both, LAYERS, exact="eager"))
    cached = partial(_hugging_face, "llama", "sdpa", use_cache=True)
    cases.append(Case("llama-sdpa-cache", cached, _token_inputs, lambda output: output.loss, (causal,) * LAYERS, LAYERS))
    same = "(t0[b, q] == t0[b, k])"
    packed = {
        "llama": f"{same} & (t1[b, k] <= t1[b, q])",
        "mistral": f"({same} & (t1[b, k] > (t1[b, q] - {WINDOW}))) & (t1[b, k] <= t1[b, q])",
    }
    if version("transformers").startswith("5.17."):  # the oldest that tests run on compares the tokens' numbers, not their positions
        packed = {"llama": f"(k <= q) & {same}", "mistral": f"((k > (q - {WINDOW})) & (k <= q)) & {same}"}
    for family, mask in packed.items():
        build, inputs = partial(_hugging_face, family, "sdpa"), partial(_token_inputs, packed=True)
        cases.append(Case(f"{family}-sdpa-packed", build, inputs, lambda output: output.loss, (mask,) * LAYERS, LAYERS))
    return cases


def spread(y: Tensor) -> Tensor:
    """A loss in which every element counts differently: a plain sum would not see what normalization layers hide."""
    return (y * torch.arange(y.numel(), dtype=y.dtype, device=y.device).cos().view_as(y)).sum()


def _encoder(norm_first: bool, dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


def _decoder(norm_first: bool, dropout: float) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, dropout, batch_first=True, norm_first=norm_first)
    return nn.TransformerDecoder(layer, LAYERS)


def _encoder_inputs(padded: bool) -> Inputs:
    inputs: Inputs = {"src": torch.randn(BATCH, LENGTH, WIDTH)}
    return {**inputs, "src_key_padding_mask": padding() == 0} if padded else inputs


def _decoder_inputs(padded: bool) -> Inputs:
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    inputs: Inputs = {"tgt": torch.randn(BATCH, LENGTH, WIDTH), "memory": torch.randn(BATCH, MEMORY, WIDTH)}
    inputs |= {"tgt_mask": mask, "tgt_is_causal": True}
    return {**inputs, "memory_key_padding_mask": padding()[:, :MEMORY] == 0} if padded else inputs


def _torch_cases() -> list[Case]:
    cases = []
    for norm_first in (True, False):
        for padded in (False, True):
            suffix = ("pre" if norm_first else "post") + ("-padded" if padded else "")
            seen = "~t0[b, k]" if padded else "True"
            encoder, decoder = partial(_encoder, norm_first), partial(_decoder, norm_first)
            cases.append(Case(f"encoder-{suffix}", encoder, partial(_encoder_inputs, padded), spread, (seen,) * LAYERS, LAYERS))
            cases.append(Case(f"decoder-{suffix}", decoder, partial(_decoder_inputs, padded), spread, ("k <= q", seen) * LAYERS, LAYERS))
    return cases


def _gpt_inputs() -> Inputs:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    return {"ids": ids, "labels": ids}


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        *_language_cases(),
        *_torch_cases(),
        Case("gpt", lambda p: Gpt(dropout=p), _gpt_inputs, lambda loss: loss, ("t0[0, 0, q, k]",) * LAYERS, LAYERS),
    )
}
