"""Runs a model once under Dynamo and hands over every graph it captures; leaves the model and Dynamo as they were.

`explain` and `prepare` need the graphs that a compile would see, graph breaks included, without a compile. So the collector here
is a Dynamo backend that runs each graph eagerly, and the call is undone afterwards: random state, buffers, what an earlier
`model.compile()` installed, Dynamo's cached code for this backend, and its memory of sizes (it would make the next compile dynamic).
"""

from __future__ import annotations

import copy
import inspect
import random
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import pgo
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import OptimizedModule, _debug_get_cache_entry_list, innermost_fn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.guards import DeletedGuardManagerWrapper

from sptc.ir.errors import SptcError
from sptc.paper.state import erase_marks

OnGraph = Callable[[fx.GraphModule, list[Any]], Callable[..., Any] | None]


class CaptureError(SptcError, RuntimeError):
    """Dynamo captured nothing, or the example inputs do not fit the model."""


def capture(model: Callable[..., Any], example_inputs: Any, on_graph: OnGraph, again: Callable[[Any], bool] | None = None) -> None:
    """Run `model` on `example_inputs` and call `on_graph(gm, inputs)` for each graph that Dynamo captures.

    Args:
        model: a module (compiled or not) or a function of tensors. It is run in the mode it is in (train or eval).
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        on_graph: gets Dynamo's graph and its inputs as a backend does, and returns what to run in its place; None runs the graph.
        again: gets what the model returned; True runs it, and what `on_graph` returned, once more from the same random state and buffers.

    Raises:
        CaptureError: no graph was captured.
        Whatever the model or `on_graph` raises.
    """
    args, kwargs = call_arguments(example_inputs)
    runs: list[_Run] = []

    collectors = [on_graph]

    def collect(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        (collector,) = collectors
        result = collector(gm, inputs)
        erase_marks(gm)  # nothing is compiled here: a prepared model is looked at
        run = _Run(result or gm.forward)
        runs.append(run)
        return run

    plain = _undecorated(model)
    # A code object of its own: Dynamo keeps what it compiles on the code object, and so forgets this one.
    run = types.FunctionType(_call.__code__.replace(), _call.__globals__)
    with ExitStack() as stack:
        roots = called_modules(plain, (*args, *kwargs.values()))
        for root in roots:
            stack.enter_context(_compiled_calls_removed(root))
        stack.enter_context(_dynamo_kept(collect))
        compiled = torch.compile(run, backend=collect)
        try:
            while True:
                with ExitStack() as kept:
                    kept.enter_context(_random_state_kept())
                    for root in roots:
                        kept.enter_context(_buffers_kept(root))
                    output = compiled(plain, args, kwargs)
                if again is None or not again(output):
                    break
        except BackendCompilerFailed as error:
            raise error.inner_exception from error.inner_exception.__cause__
        finally:
            collectors.clear()  # Dynamo keeps its backends, and with them what they refer to
            for done in runs:
                done.call = None
    if not runs:
        raise CaptureError(
            f"Dynamo captured no graph of {_name(model)}: nothing in it could be compiled (is torch.compile disabled, "
            "or does every call sit in a function that Dynamo skips? TORCH_LOGS=graph_breaks tells)"
        )


class _Run:
    """What runs in a graph's place. Dynamo leaves it in the globals of the frame that it compiled: emptied, it keeps nothing alive."""

    __slots__ = ("__weakref__", "call")  # Dynamo's wrapper copies the dict of what it wraps

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call: Callable[..., Any] | None = call

    def __call__(self, *args: Any) -> Any:
        assert self.call is not None, "the capture is over"
        return self.call(*args)


def _call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _name(model: Callable[..., Any]) -> str:
    return getattr(model, "__qualname__", None) or type(model).__name__


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call that example inputs stand for.

    Raises:
        CaptureError: they are of another type.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):  # a dict, or a tokenizer's BatchEncoding
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str | bytes):
        return tuple(example_inputs), {}
    raise CaptureError(
        "example_inputs must be a tensor, a tuple or list of arguments, or a dict of keyword arguments, "
        f"got {type(example_inputs).__name__}"
    )


def _undecorated(model: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` wrapped, if it did."""
    return model._orig_mod if isinstance(model, OptimizedModule) else innermost_fn(model)


def called_modules(model: Callable[..., Any], arguments: Sequence[Any] = ()) -> list[nn.Module]:
    """The modules that a call runs: the model, or those that a function gets as arguments or names in its closure and globals."""
    candidates = [model, *arguments, getattr(model, "__self__", None)]
    if inspect.isroutine(model):
        names = inspect.getclosurevars(model)
        candidates += [*names.nonlocals.values(), *names.globals.values()]
    return [value for value in candidates if isinstance(value, nn.Module)]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python = random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore buffers that the run changed in place or replaced; those it left alone are not touched."""
    held = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    unique = {id(buffer): buffer for _, _, buffer in held if buffer is not None}
    values = {key: buffer.clone() for key, buffer in unique.items()}
    try:
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer
        with torch.no_grad():
            for key, value in values.items():
                # By value: batch norm changes its running statistics without a new version.
                if not torch.equal(unique[key], value):
                    unique[key].copy_(value)


@contextmanager
def _compiled_calls_removed(model: nn.Module) -> Iterator[None]:
    """Let modules on which `.compile()` was called run as written, so that the collector sees their graphs."""
    calls = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    for module, _ in calls:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in calls:
            module._compiled_call_impl = call


@contextmanager
def _dynamo_kept(backend: Callable[..., Any]) -> Iterator[None]:
    """Take back what compiling for `backend` leaves in Dynamo: cache entries on code objects and the sizes it remembers."""
    codes: list[types.CodeType] = []
    hook = register_bytecode_hook(lambda code, _: codes.append(code))
    sizes = copy.deepcopy(pgo._CODE_STATE)
    # A model may repeat a frame for every layer; sizes stay as the example has them unless the user marked them dynamic.
    settings: dict[str, Any] = {
        "automatic_dynamic_shapes": False,
        "suppress_errors": False,
        "recompile_limit": 1 << 16,
        "accumulated_recompile_limit": 1 << 16,
    }
    try:
        with torch._dynamo.config.patch(settings):
            yield
    finally:
        hook.remove()
        for code in codes:
            _forget(code, backend)
        pgo._CODE_STATE = sizes


def _forget(code: types.CodeType, backend: Callable[..., Any]) -> None:
    """Drop what was compiled for `backend`, and only that.

    Dynamo can clear a code object whole, or empty single entries. An emptied entry still counts towards the recompile limit, so it is
    used only where the user's own compiled code shares the code object.
    """
    entries = _debug_get_cache_entry_list(code)
    live = [entry for entry in entries if entry.code is not None]
    ours = [entry for entry in live if getattr(entry.backend, "compiler_fn", entry.backend) is backend]
    if len(ours) == len(live):
        reset_code(code)
        return
    for entry in ours:
        assert entry.guard_manager.extra_state is not None
        entry.guard_manager.extra_state.invalidate(entry, DeletedGuardManagerWrapper("sptc looked at this graph"))
