"""Any model of transformers, tiny, from its configuration class alone, and a batch that it takes.

No model is known by name here. A configuration's fields are shrunk by what they are called and what they hold, which is the one thing that
transformers keeps alike across its models; a model for which that does not give a working combination is passed over, with the reason.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

WIDTH, HIDDEN, HEADS, KEY_HEADS, LAYERS, VOCABULARY, LENGTH, BATCH, IMAGE, EXPERTS = 32, 64, 4, 2, 2, 99, 16, 2, 32, 4

# What a field is called, after whatever its part of the model is called -> its tiny value; the first that matches counts. Fields of other
# types than numbers stay.
_SIZES: tuple[tuple[str, int], ...] = (
    ("(vocab_size|vocabulary_size)(_.*)?", VOCABULARY),
    ("num_key_value_heads|num_kv_heads|n_head_kv|num_global_key_value_heads", KEY_HEADS),
    (r"num_attention_heads|attention_heads|n_heads?|num_heads|num_v_heads|linear_num_\w+_heads", HEADS),
    ("num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_blocks", LAYERS),
    ("num_local_experts|num_experts|n_routed_experts", EXPERTS),
    ("num_experts_per_tok|moe_k|num_experts_per_token|moe_topk|top_k_experts", 2),
    ("n_group|topk_group", 1),
    (r"intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|feedforward_dim|hidden_dim|moe_intermediate_size_\w+", HIDDEN),
    (r"head_dim|d_kv|rotary_dim|linear_\w+_head_dim", WIDTH // HEADS),
    ("q_lora_rank|kv_lora_rank", WIDTH // 2),
    ("hidden_size|d_model|n_embd|embed_dim|embedding_size|word_embed_proj_dim|model_dim|projection_dim|output_size|pooler_size|dim", WIDTH),
    ("max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|max_seq_len|block_size", 4 * LENGTH),
    ("image_size", IMAGE),
    ("patch_size", IMAGE // 4),
    ("pad_token_id|pad_token|pad_index", 0),
    ("bos_token_id|decoder_start_token_id|bos_index", 1),
    ("eos_token_id|sep_token_id|eos_index|forced_eos_token_id", 2),
    ("image_token_id|image_token_index|mask_token_id|video_token_id|audio_token_id", 3),
    ("dropout|drop|pdrop|dropout_prob|dropout_p|layerdrop|drop_path_rate|dropout_rate|drop_rate|mask_time_prob|mask_feature_prob", 0),
)


class Unbuildable(Exception):
    """The rules of this file do not give a working model."""


def tiny_config(config_class: Any, attention: str) -> Any:
    """The configuration with all its sizes tiny, those of its parts too."""
    return config_class(**{**_shrunk(config_class()), "attn_implementation": attention})


def _shrunk(config: Any) -> dict[str, Any]:
    """The fields to change and their tiny values; a part that is a configuration becomes a dict of its own."""
    fields = dict(_fields(config))
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        if hasattr(value, "model_type"):
            changes[name] = _shrunk(value)
        elif (tiny := _tiny(name, value)) is not None:
            changes[name] = tiny
    heads = {fields[name] for name in changes if name.endswith(("num_attention_heads", "num_heads"))}
    for name in changes:
        if name.endswith("num_key_value_heads") and fields[name] in heads:
            changes[name] = HEADS
    if any(
        "num_heads" in name and isinstance(value, list | tuple) for name, value in fields.items()
    ):  # stages that grow: widths fit heads as they are
        changes = {name: value for name, value in changes.items() if value != WIDTH}
    layers = next((changes[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in changes), None)
    for name, value in fields.items():
        if layers and isinstance(value, list) and value and name in ("layer_types", "attention_types", "mlp_layer_types"):
            changes[name] = _spread(value, layers)
    return changes


def _spread(kinds: list[Any], layers: int) -> list[Any]:
    """One entry a layer, with every kind among them as far as there is room."""
    if isinstance(kinds[0], list):  # [[kinds], times]
        return [[kinds[0][0], layers // len(kinds[0][0])]]
    return (list(dict.fromkeys(kinds)) * layers)[:layers]


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        if field.init and not isinstance(getattr(type(config), field.name, None), property):
            yield field.name, getattr(config, field.name, None)


def _tiny(name: str, value: Any) -> Any:
    if name == "vocab_size":
        return VOCABULARY
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    tiny = next((tiny for pattern, tiny in _SIZES if re.fullmatch(f"(.*_)?({pattern})", name)), None)
    if tiny is None:
        return None
    return type(value)(tiny if tiny == 0 or _NAMES_A_TOKEN.search(name) else min(value, tiny) or value)


_NAMES_A_TOKEN = re.compile("token|pad|index")


def tiny_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """Inputs for a forward pass: what the main input is called tells its kind."""
    main = model.main_input_name
    accepted = inspect.signature(model.forward).parameters
    batch: dict[str, Any] = {}
    if main == "input_ids":
        batch["input_ids"] = torch.randint(4, VOCABULARY - 1, (BATCH, LENGTH))
    elif main == "pixel_values":
        size = getattr(model.config, "image_size", IMAGE)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        batch["pixel_values"] = torch.randn(BATCH, getattr(model.config, "num_channels", 3), height, width)
    elif main == "input_values":
        batch["input_values"] = torch.randn(BATCH, 2000)
    elif main == "input_features":
        names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
        bins = next((size for name in names if (size := getattr(model.config, name, None))), 80)
        batch["input_features"] = torch.randn(BATCH, 2 * LENGTH, bins)
    else:
        raise Unbuildable(f"an input {main!r} of unknown kind")
    if "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = torch.randint(4, VOCABULARY - 1, (BATCH, LENGTH - 5))
    if "use_cache" in accepted:
        batch["use_cache"] = False
    return batch
