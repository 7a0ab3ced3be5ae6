"""A model and example inputs from a name on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch


class ModelError(ValueError):
    """The name leads to no model: what is wrong, and what to write instead."""


def load_model(name: str, batch: int, length: int) -> tuple[Callable[..., Any], Any]:
    """(model, example inputs) of "package.module:factory", of a folder written by `save_pretrained`, or of a Hugging Face name.

    A Hugging Face model is made from its configuration with random weights: shapes decide, not values.

    Raises:
        ModelError: there is no such model, or it can't be given inputs.
    """
    if ":" in name and not os.path.exists(name):
        return _from_factory(name)
    return _from_transformers(name, batch, length)


def _from_factory(name: str) -> tuple[Callable[..., Any], Any]:
    module_name, _, path = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ModelError(f"importing {module_name!r} failed: {error}") from error
        raise ModelError(f"there is no module {module_name!r}; write package.module:factory") from error
    for part in path.split("."):
        if not hasattr(target, part):
            raise ModelError(f"module {module_name!r} has no {path!r}; write package.module:factory")
        target = getattr(target, part)
    if not callable(target):
        raise ModelError(f"{name!r} is no function but {type(target).__name__}; it must return (model, example_inputs)")
    made = target()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise ModelError(f"{name!r} must return (model, example_inputs), got {_described(made)}")
    return made[0], made[1]


def _described(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(x).__name__ for x in made) or 'nothing'}"
    return type(made).__name__


def _from_transformers(name: str, batch: int, length: int) -> tuple[Callable[..., Any], Any]:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{name!r} needs transformers: pip install 'sptc[hf]', or write package.module:factory") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no model {name!r}: it is neither a folder with a config.json nor a Hugging Face model that can be read ({first}); "
            "for your own code write package.module:factory"
        ) from error
    architecture = (config.architectures or ["AutoModel"])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise ModelError(f"{name!r} is a {architecture}, which transformers {transformers.__version__} does not have")
    inputs = _token_inputs(name, config, batch, length)
    config.use_cache = False  # a training step keeps no keys and values
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # classifiers look for the last token that is no padding
    model = cls(config) if architecture != "AutoModel" else cls.from_config(config)
    return model.to(config.dtype or torch.float32), inputs


def _token_inputs(name: str, config: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ModelError(
            f"{name!r} does not take tokens (its configuration has no vocab_size); write package.module:factory with its inputs"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ModelError(f"--length {length} is more than the {longest} positions of {name!r}")
    ids = torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs
