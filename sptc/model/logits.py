"""What a compiled graph returns for logits that its loss does not need: computed when they are used, or an error that says so.

A loss is computed for some rows at a time and needs no logits of all tokens; most training steps read the loss alone. With option
`loss.logits="defer"` who does read logits finds what the model gives, with its gradient, and pays for it then. With "drop" they raise.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sptc.ir.errors import SptcError

# What tells a kind of tensor and not its content: whoever only passes outputs on, such as a wrapper for mixed precision, asks for these.
_KIND = frozenset({"dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_sparse"})
_KEEP = "compile the model with options={'loss.logits': 'keep'}, which computes them in every step"
# Copies may wait as long as nothing can have written to what they are of (`_Once.copied`).
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


class DroppedLogitsError(SptcError, RuntimeError):
    """Logits were used that were not computed."""


class StaleLogitsError(SptcError, RuntimeError):
    """Logits were first used after a tensor that they are computed from had changed."""


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
            "torch.no_grad() for logits, or compile it without that option, which computes logits when they are used"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "DroppedLogits()"


def dropped_logits() -> Tensor:
    return torch.empty(0).as_subclass(DroppedLogits)


class _Once:
    """A value that is computed when it is first asked for, without gradient, and copies of it that are computed from it."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None
        self._copies: list[weakref.ref[_Once]] = []
        self._lock = threading.Lock()

    @property
    def computed(self) -> bool:
        return self._value is not None

    def copied(self, make: Callable[[Tensor], Tensor]) -> _Once:
        """A copy of the value, computed when it is asked for, or as soon as the value is in hands that may write to it."""
        later = _Once(lambda: make(self._own()))
        if self.computed:
            later._own()
        else:
            self._copies.append(weakref.ref(later))
        return later

    @torch.compiler.disable
    def value(self) -> Tensor:
        value = self._own()
        for made in self._copies:
            if (later := made()) is not None:
                later._own()
        self._copies.clear()
        return value

    def _own(self) -> Tensor:
        with self._lock:
            if self._value is None:
                assert self._compute is not None
                with torch.inference_mode(False), torch.no_grad():  # whatever uses it first, others may need it for a gradient
                    self._value, self._compute = self._compute(), None
            return self._value


class DeferredLogits(Tensor):
    """Logits that are computed when something reads more of them than their shape, dtype or device; to autograd a tensor like any other.

    Every operator reaches `__torch_dispatch__`, below autograd; what reads memory without one is overridden here. `torch.compile` does not
    trace into it: code that it compiles goes on, behind a graph break, with what an operator made of the logits.
    """

    _once: _Once

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What wrappers for mixed precision and of other libraries do with every output need not be a use.
        if func is torch.ops.aten.detach.default:
            return _standing_for(args[0], args[0]._once)
        if func in _COPIES and not {"device", "layout"} & kwargs.keys():
            (logits,), copied = args, partial(func, **kwargs)
            like = copied(torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta"))
            return _standing_for(like, logits._once.copied(copied), logits.device)
        computed = pytree.tree_map_only(DeferredLogits, lambda logits: logits._once.value(), (args, kwargs))
        result = func(*computed[0], **computed[1])
        return next((_written(given, own) for given, own in zip(args, computed[0], strict=True) if own is result), result)

    @property
    def data(self) -> Tensor:
        return torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(f"logits that are computed once they are used can't be given other data; {_KEEP}")

    def _plain(self) -> Tensor:
        return self._once.value().detach().requires_grad_(self.requires_grad)

    def numpy(self, *, force: bool = False) -> Any:
        return self._plain().numpy(force=force)

    def tolist(self) -> Any:
        return self._plain().tolist()

    def data_ptr(self) -> int:
        return self._plain().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._plain().untyped_storage()

    def __dlpack__(self, **how: Any) -> Any:
        return self._plain().__dlpack__(**how)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self._plain(), memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._plain())


def deferred_logits(gm: fx.GraphModule, inputs: Sequence[int], x: Tensor, arguments: Sequence[Any]) -> Tensor:
    """Logits that are computed when they are used.

    Args:
        gm: computes them from `x` and some inputs of the compiled graph.
        inputs: which these are.
        x: the input of their projection, [..., d], without gradient.
        arguments: those that the compiled graph was called with.
    """
    operands = [x, *(arguments[place] for place in inputs)]
    states = list(map(_state, operands))

    def compute() -> Tensor:
        if list(map(_state, operands)) != states:
            raise StaleLogitsError(
                "logits were first used after a tensor that they are computed from had changed: use them before weights or inputs "
                f"change, or {_KEEP}"
            )
        if x.is_cuda:
            x.record_stream(torch.cuda.current_stream(x.device))  # whoever uses them first may do so on another stream than the graph's
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = gm(*operands)
        return logits

    like = gm(*pytree.tree_map_only(Tensor, lambda t: t.to("meta"), operands))
    return _standing_for(like, _Once(compute), x.device)


def _standing_for(like: Tensor, once: _Once, device: torch.device | None = None) -> DeferredLogits:
    """A tensor of the sizes, strides and dtype of `like` that computes itself."""
    sizes, strides, device = like.shape, like.stride(), device or like.device
    logits: DeferredLogits = Tensor._make_wrapper_subclass(DeferredLogits, sizes, strides, dtype=like.dtype, device=device)
    torch._C._set_throw_on_mutable_data_ptr(logits)  # for an extension that asks for the memory itself
    logits._once = once
    return logits


def _written(given: Any, own: Any) -> Any:
    """What an in-place operator returns: what it was given."""
    if isinstance(given, DeferredLogits) and (own.shape, own.stride()) != (given.shape, given.stride()):
        raise RuntimeError(f"sizes of logits that are computed once they are used can't be changed in place; clone them, or {_KEEP}")
    return given


def _state(operand: Any) -> tuple[int, int] | None:
    """What differs once a tensor has changed: in place, by another storage behind `.data`, or by a sharded weight that was freed."""
    return None if not isinstance(operand, Tensor) or operand.is_inference() else (operand._version, operand.data_ptr())
