"""A model and example inputs from a name on the command line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sptc.ir.errors import SptcError


class ModelError(SptcError, ValueError):
    """The name leads to no model: what is wrong, and what to write instead."""


def load_model(name: str, batch: int | None = None, length: int | None = None) -> tuple[Callable[..., Any], Any]:
    """(model, example inputs) of "package.module:factory", of a folder written by `save_pretrained`, or of a Hugging Face name.

    A Hugging Face model is made from its configuration with random weights: shapes decide, not values. A factory that has parameters
    `batch` and `length` gets them; None is 1 sequence, and 512 tokens.

    Raises:
        ModelError: there is no such model, it can't be given inputs, or not of the size that is asked for.
    """
    sized = batch is not None or length is not None
    batch, length = batch or 1, length or 512
    if is_factory(name):
        if sized and not takes_sizes(factory_of(name)):
            raise ModelError(f"{name!r} makes inputs of its own size: a factory with parameters `batch` and `length` is given them")
        return _from_factory(name, batch, length)
    cls, config = _architecture(name)
    return _with_random_weights(cls, config), _token_inputs(name, config, batch, length)


def load_trained(name: str, batch: int, length: int) -> tuple[Callable[..., Any], Any, list[str]]:
    """As `load_model`, with its trained weights and a text of its tokenizer where there are such, and notes that say what there is.

    The dropouts of a Hugging Face model are set to 0: a step can then be compared with another. It computes in fp32.

    Raises:
        ModelError: as `load_model`.
    """
    if is_factory(name):
        return *_from_factory(name, batch, length), []
    cls, config = _architecture(name)
    inputs, notes = _token_inputs(name, config, batch, length), []
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float) and value:
            setattr(config, key, 0.0)
            notes.append(f"{key} is 0 here, not {value}")
    try:
        model = cls.from_pretrained(name, config=config, dtype="float32")
    except OSError:
        model = _with_random_weights(cls, config).float()
        notes.append(
            f"{name} has no weights here: they are random, and densities that are measured on the batch say nothing of a trained model"
        )
    ids = _text(name, batch, length)
    if ids is None:
        notes.append(f"{name} has no tokenizer here: its tokens are random")
    else:
        inputs |= {key: ids for key in inputs if key.endswith("input_ids")}
    return model, inputs, notes


def is_factory(name: str) -> bool:
    """Whether a name is one of "package.module:factory"."""
    return ":" in name and not os.path.exists(name)


def takes_sizes(factory: Callable[..., Any]) -> bool:
    """Whether a factory wants to be told how many sequences of how many tokens."""
    return {"batch", "length"} <= inspect.signature(factory).parameters.keys()


def _from_factory(name: str, batch: int, length: int) -> tuple[Callable[..., Any], Any]:
    target = factory_of(name)
    made = target(batch=batch, length=length) if takes_sizes(target) else target()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise ModelError(f"{name!r} must return (model, example_inputs), got {_described(made)}")
    return made[0], made[1]


def factory_of(name: str) -> Callable[..., Any]:
    """The function that "package.module:factory" names.

    Raises:
        ModelError: there is none.
    """
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
    return target


def _described(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(x).__name__ for x in made) or 'nothing'}"
    return type(made).__name__


def _architecture(name: str) -> tuple[Any, Any]:
    """The class of a Hugging Face model, and its configuration for a training step."""
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
    config.use_cache = False  # a training step keeps no keys and values
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # classifiers look for the last token that is no padding
    return cls, config


def _with_random_weights(cls: Any, config: Any) -> torch.nn.Module:
    model = cls.from_config(config) if cls.__name__ == "AutoModel" else cls(config)
    return model.to(config.dtype or torch.float32)


def _text(name: str, batch: int, length: int) -> torch.Tensor | None:
    """int64 [batch, length], tokens of the Python standard library's sources, which every machine has; None without a tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= batch * length:
            return torch.tensor(ids[: batch * length], dtype=torch.int64).view(batch, length)
    return None


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
