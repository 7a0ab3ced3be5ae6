"""The autocast rule of our ops: named arguments in the active dtype, everything else as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_cast_positions: dict[str, frozenset[int]] = {}


def register(lib: torch.library.Library, name: str, cast: Sequence[str]) -> None:
    """Under autocast, `sptc::{name}` gets its arguments `cast` in the dtype active at the call (fp64 stays), and runs without autocast.

    `torch.library.register_autocast` would fix one dtype at registration and cast every argument, scores and codebooks included.
    """
    op = getattr(torch.ops.sptc, name).default
    positions = frozenset(i for i, argument in enumerate(op._schema.arguments) if argument.name in cast)
    _cast_positions[op.name()] = positions
    for device, key_name in _DEVICES.items():
        key = getattr(torch._C.DispatchKey, key_name)
        keys = torch._C.DispatchKeySet(key)

        def rule(*args: object, device: str = device, keys: torch._C.DispatchKeySet = keys) -> object:
            dtype = torch.get_autocast_dtype(device)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*(_cast(arg, dtype) if i in positions else arg for i, arg in enumerate(args)))

        op.py_impl(key)(rule)  # what torch.compile traces through
        lib.impl(name, lambda _, *args, rule=rule: rule(*args), key_name, with_keyset=True)


def cast_positions(op: torch._ops.OpOverload) -> frozenset[int]:
    """Which arguments of one of our ops autocast casts; none for an op without a rule."""
    return _cast_positions.get(op.name(), frozenset())


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, (list, tuple)):
        return [_cast(item, dtype) for item in value]
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
