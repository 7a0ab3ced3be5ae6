"""The trained state of a prepared model in a file of its own: a safetensors file, without pickle, with a schema in its metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from sptc.device.cache import write_whole
from sptc.ir.errors import SptcError
from sptc.paper.state import owners

SCHEMA = "sptc-state-1"


class StateError(SptcError, ValueError):
    """State can't be saved or loaded: what is wrong with the model or the file."""


def save_state(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write routers and codebooks of a prepared model to one safetensors file. It is there whole or not at all.

    Tensors are named by the module that owns them and by region, "layers.0.mlp.ffn0.weight", with the shapes and dtypes that they have.

    Raises:
        StateError: the model is not prepared, or its state is sharded.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(model).items()}
    write_whole(Path(path), save(tensors, metadata={"schema": SCHEMA}))


def load_state(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a prepared model the state that `save_state` wrote of one like it. All of it is checked before any tensor is changed.

    Raises:
        StateError: the model is not prepared, or sharded; the file is none of `save_state`'s; its tensors are not the model's by name,
            shape and dtype. Nothing was changed.
        FileNotFoundError: there is no such file.
    """
    held = _state(model)
    read = _read(Path(path))
    missing, unknown = sorted(held.keys() - read.keys()), sorted(read.keys() - held.keys())
    if missing or unknown:
        lacks = f"it lacks {_some(missing)}" if missing else ""
        more = f"it has {_some(unknown)}, which the model has not" if unknown else ""
        raise StateError(
            f"{path} is the state of another model: {' and '.join(filter(None, (lacks, more)))}; prepare the same model with the same "
            "options"
        )
    for name, tensor in held.items():
        if (read[name].shape, read[name].dtype) != (tensor.shape, tensor.dtype):
            raise StateError(
                f"{path}: {name} is {list(read[name].shape)} in {read[name].dtype}, the model's is {list(tensor.shape)} in {tensor.dtype}; "
                "prepare the same model with the same options, in the same dtype"
            )
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(read[name])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the state, those of the model itself, by owner, slot and name."""
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    found: dict[str, Tensor] = {}
    for name, owner in owners(model):
        prefix = f"{name}." if name else ""
        for slot, module in owner.spt.slots().items():  # type: ignore[union-attr, operator]
            found |= {f"{prefix}{slot}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    if not found:
        raise StateError("the model holds no trained state of sptc's: sptc.prepare(model, batch, options) adds it")
    sharded = [name for name, tensor in found.items() if hasattr(tensor, "full_tensor")]
    if sharded:
        raise StateError(
            f"{sharded[0]} is sharded over processes; save and load the state before fully_shard, or by torch.distributed.checkpoint"
        )
    return found


def _read(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            schema = (file.metadata() or {}).get("schema")
            if schema != SCHEMA:
                raise StateError(f"{path} is no file of sptc.save_state's: its schema is {schema!r}, not {SCHEMA!r}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except SafetensorError as error:
        raise StateError(f"{path} is no safetensors file, or is cut off: {error}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
