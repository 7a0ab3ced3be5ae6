"""Autocast as it is where a node stands: what its graph switched before it, around it, and around the call of a checkpoint body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Node

_AROUND = "sptc_autocast"  # key of a body's meta: what `casts` gave where it is called
_DEVICES = ("cpu", "cuda")


def remember_autocast(body: fx.GraphModule) -> None:
    """Note what autocast is while a checkpoint body is traced."""
    body.meta[_AROUND] = {device: _active(device) for device in _DEVICES}


def autocast_dtype(node: Node, device: str) -> torch.dtype | None:
    """What autocast casts to on `device` where `node` stands; None if it is off, or if the device has none."""
    if device not in _DEVICES:
        return None
    blocks: dict[Node, Any] = {}  # open ones, outermost first: dtype and whether enabled
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is _enter_autocast and other.args[0] == device:
            blocks[other] = other.args[1:3]
        elif other.target is _exit_autocast:
            blocks.pop(other.args[0], None)
    if blocks:
        dtype, enabled = blocks.popitem()[1]
        return (dtype or torch.get_autocast_dtype(device)) if enabled else None
    meta = getattr(node.graph.owning_module, "meta", {})
    return meta[_AROUND][device] if _AROUND in meta else _active(device)


@contextmanager
def autocast_like(node: Node, device: str) -> Iterator[None]:
    """Autocast on `device` as it is where `node` stands."""
    if device not in _DEVICES:
        yield
        return
    dtype, before, cached = autocast_dtype(node, device), _active(device), torch.is_autocast_cache_enabled()
    default = torch.get_autocast_dtype(device)
    torch.set_autocast_cache_enabled(False)  # what is cast here is a fake
    _switch(device, dtype)
    try:
        yield
    finally:
        _switch(device, before)
        torch.set_autocast_dtype(device, default)
        torch.set_autocast_cache_enabled(cached)


def _active(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _switch(device: str, dtype: torch.dtype | None) -> None:
    torch.set_autocast_enabled(device, dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype(device, dtype)
