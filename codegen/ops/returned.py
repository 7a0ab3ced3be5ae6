"""Results of a graph that as a rule have no gradient of their own, such as logits beside their loss, without gradients of zeros.

A compiled graph is one node for autograd, which fills a whole tensor with zeros for each of its results that nothing outside computes
with. So such a result leaves the graph without gradient, beside a number: the handle of what is returned. Where a gradient comes for it,
`returned` hands it over, and the handle's gradient says which it is; 0 is none. Backward adds it in place.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sptc.ir.errors import SptcError

_lib = torch.library.Library("sptc", "FRAGMENT")
_lib.define("apart(Tensor value) -> (Tensor, Tensor)")
_lib.define("handle_of(Tensor value) -> Tensor")
_lib.define("hand_over(Tensor gradient) -> Tensor")
# No CUDA graph may hold it: what it does is told by a number in the memory of the host.
_lib.define("add_handed_(Tensor(a!) gradient, Tensor handle) -> ()", tags=(torch.Tag.cudagraph_unsafe,))

_handed: dict[int, Tensor] = {}
_handles = itertools.count(2**40 + 1, 2)  # no multiple of one is another


class HandleError(SptcError, RuntimeError):
    """The gradient of a result was not found."""


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        return value.view_as(value), torch.ops.sptc.handle_of(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()  # may be another's as well; where it is not, Inductor copies nothing
        torch.ops.sptc.add_handed_(total, gradients[1])
        return total


class _Returned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, handle: Tensor, shown: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        return shown(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None, None]:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None
        handle: Tensor = torch.ops.sptc.hand_over(gradient)
        if not torch.compiler.is_compiling():  # where backward fails before it is found, it goes with the graph
            weakref.finalize(ctx, _handed.pop, int(handle), None)
        return None, handle, None


def apart(value: Tensor) -> tuple[Tensor, Tensor]:
    """`value`, for all that computes with it in the graph, and a handle, float64 [] on the CPU, for the graph to return beside it.

    It is traced through. The gradient of `value` is that of the first plus what was handed over for the second.
    """
    applied: tuple[Tensor, Tensor] = _Apart.apply(value)  # type: ignore[no-untyped-call]
    return applied


def handle_of(value: Tensor) -> Tensor:
    """A handle. An operator, so that two values never have the same, and no C++ is compiled for a number beside kernels of a GPU."""
    return new_handle()


def new_handle() -> Tensor:
    """A handle, float64 [] on the CPU: 0."""
    return _handle(0)


def hand_over(gradient: Tensor) -> Tensor:
    """The gradient of a handle, by which `add_handed_` finds `gradient`, once."""
    number = next(_handles)
    _handed[number] = gradient
    return _handle(number)


def add_handed_(gradient: Tensor, handle: Tensor) -> None:
    """Add to `gradient` what was handed over for the handle; of the same number of elements, under any shape and dtype.

    Raises:
        HandleError: nothing was.
    """
    found = handed(handle)
    if found is not None:
        gradient.add_(found.reshape(gradient.shape))


def handed(handle: Tensor) -> Tensor | None:
    """What was handed over for the handle, once; None for the gradient of one that nothing was handed over for.

    Raises:
        HandleError: it is another's.
    """
    number = handle.item()
    if not number:
        return None
    found = _handed.pop(number, None)  # type: ignore[arg-type]
    if found is None:
        raise HandleError(
            "a hook on the autograd node of a compiled graph changed the gradients of all its results, one of which tells where another "
            "one is: let it leave alone the gradient of dtype float64 and shape [] that stands last, or hook the results themselves"
        )
    return found


def joined(
    call: Callable[..., Sequence[Any]],
    handles: Sequence[tuple[int, int]],
    deferred: Mapping[int, Callable[..., Tensor]],
) -> Callable[..., list[Any]]:
    """A call of a graph whose results get their gradients back.

    Args:
        call: returns the results of a graph, handles behind all others.
        handles: which result belongs to which handle, by position.
        deferred: makes a result, by position, of what the graph returned in its place, given `arguments` of the call as well.
    """
    first = min(handle for _, handle in handles)

    def joining(*args: Any) -> list[Any]:
        results = [*call(*args)]
        for place, handle in handles:
            # As it is it would be a view of what the graph returned, and users may not write to that.
            shown = partial(deferred[place], arguments=args) if place in deferred else torch.detach
            results[place] = _Returned.apply(results[place], results[handle], shown)  # type: ignore[no-untyped-call]
        return results[:first]

    return joining


def _handle(number: int) -> Tensor:
    return torch.tensor(float(number), dtype=torch.float64, device="cpu")


_lib.impl("apart", apart, "CompositeImplicitAutograd")
for _key in ("CPU", "CUDA"):
    _lib.impl("handle_of", handle_of, _key)
    _lib.impl("hand_over", hand_over, _key)
    _lib.impl("add_handed_", add_handed_, _key)
for _name in ("handle_of", "hand_over"):
    torch.library.register_fake(f"sptc::{_name}", lambda x: x.new_empty((), dtype=torch.float64, device="cpu"), lib=_lib)
torch.library.register_fake("sptc::add_handed_", lambda gradient, handle: None, lib=_lib)
