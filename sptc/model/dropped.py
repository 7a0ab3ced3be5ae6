"""What a compiled graph returns for logits that option `loss.logits="drop"` does not compute: a tensor that says so when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sptc.ir.errors import SptcError

# What tells a kind of tensor and not its content: whoever only passes outputs on, such as a wrapper for mixed precision, asks for these.
_KIND = frozenset({"dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_sparse"})


class DroppedLogitsError(SptcError, RuntimeError):
    """Logits were used that were not computed."""


class DroppedLogits(Tensor):
    """An empty tensor in place of logits. Whatever reads more of it than its dtype and device raises DroppedLogitsError."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        owner = getattr(func, "__self__", None)  # the property that a getter belongs to
        if getattr(func, "__name__", "") == "__get__" and getattr(owner, "__name__", "") in _KIND:
            return super().__torch_function__(func, types, args, kwargs or {})
        name = getattr(owner, "__name__", None) or getattr(func, "__name__", str(func))
        raise DroppedLogitsError(
            f"{name} of logits that were not computed: the model was compiled with "
            "options={'loss.logits': 'drop'}, which gives the loss without them wherever gradients are recorded. Run the model under "
            "torch.no_grad() for logits, or compile it with 'loss.logits': 'keep'"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "DroppedLogits()"


def dropped_logits() -> Tensor:
    return torch.empty(0).as_subclass(DroppedLogits)
