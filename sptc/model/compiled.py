"""What the backend hands to Dynamo, and how to find it again from a model.

The report of a compile is kept on the compiled object. Dynamo stores that object as a global of the frame it compiled for, wrapped by
`disable`, under a name that only the modified bytecode tells; after a graph break that bytecode also names the function that goes on. So
the way from a model to its reports leads through the cache entries of its frames' code objects. Code objects are shared between the
instances of a class, and a decorator's wrapper between all that it decorates: parameters tell whose a graph is.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, _debug_get_cache_entry_list, innermost_backend, innermost_fn

from sptc.ir.errors import SptcError
from sptc.model.capture import called_modules
from sptc.model.logits import dropped_logits
from sptc.model.outside import outside_note
from sptc.model.recompiles import limit_note
from sptc.reports.report import Report


class CompiledGraph:
    """A compiled graph with the report of its compile. `called` is told the arguments of each call until it returns True."""

    def __init__(
        self,
        call: Callable[..., Any],
        report: Report,
        inputs: Sequence[Any],
        dropped: Sequence[int] = (),
        called: Callable[[Sequence[Any]], bool] | None = None,
    ) -> None:
        self._call = call
        self._called = called
        self._dropped = frozenset(dropped)
        self.report = report
        parameters = [x for x in inputs if isinstance(x, nn.Parameter)]
        self.parameters = tuple(weakref.ref(p) for p in parameters)
        self._shapes = Counter((tuple(p.shape), p.dtype) for p in parameters)

    def __call__(self, *args: Any) -> Any:
        if self._called is not None and self._called(args):
            self._called = None
        results = self._call(*args)
        return [dropped_logits() if i in self._dropped else r for i, r in enumerate(results)] if self._dropped else results

    def live_parameters(self) -> list[nn.Parameter]:
        """The parameters that it was compiled with, as far as they exist."""
        return [p for p in (held() for held in self.parameters) if p is not None]

    def compiled_for(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether it was compiled with one of these parameters."""
        own = {id(p) for p in parameters}
        return any(id(p) in own for p in self.live_parameters())

    def fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether it could run for these parameters, as far as shapes tell: Dynamo reuses code for another instance of an architecture."""
        return self._shapes <= Counter((tuple(p.shape), p.dtype) for p in parameters)


class ReportError(SptcError, RuntimeError):
    """There is nothing to report on."""


def report(model: Callable[..., Any]) -> Report:
    """The report of what backend "spt" compiled for `model` so far; graph breaks and recompiles make several graphs.

    Args:
        model: what `torch.compile` returned, or a module on which `.compile()` was called.

    Raises:
        ReportError: nothing was compiled for it yet.
    """
    found, codes = _compiled(model)
    graphs = [found[at] for at in sorted(found)]
    if not graphs:
        name = getattr(model, "__name__", type(model).__name__)
        raise ReportError(
            f"no graph of {name} was compiled with backend 'spt': compile it with torch.compile(model, backend='spt') or "
            "model.compile(backend='spt'), a deepcopy anew, and run it once before asking for its report (sptc.explain needs no compile)"
        )
    first: dict[Any, int] = {}  # by frame and parameters
    keys = [(at[0], at[2], frozenset(map(id, found[at].live_parameters()))) for at in sorted(found)]
    same = [first.setdefault(key, i) for i, key in enumerate(keys)]
    notes = [note for code in codes if (note := limit_note(code)) is not None]
    root = model._orig_mod if isinstance(model, OptimizedModule) else innermost_fn(model)
    if isinstance(root, nn.Module):
        own = [graph for graph in graphs if graph.compiled_for([*root.parameters()])]
        if own or not any(graph.parameters for graph in graphs):  # otherwise all were compiled for another instance
            outside = outside_note(root, {id(p) for graph in own for p in graph.live_parameters()})
            notes += [outside] if outside is not None else []
    return Report.merged((graph.report for graph in graphs), notes, same)


_At = tuple[int, int, int]  # which frame, which compile of it, and which of the graphs that DDPOptimizer made of that


def _compiled(model: Callable[..., Any]) -> tuple[dict[_At, CompiledGraph], set[types.CodeType]]:
    """The graphs of `model` by when they were compiled, and the code objects that were looked at."""
    seen: set[types.CodeType] = set()
    root: Callable[..., Any] = innermost_fn(model)
    backend = _backend(model)
    starts: list[Any] = []
    own: dict[_At, CompiledGraph] = {}
    if isinstance(model, OptimizedModule):
        root = model._orig_mod
        starts = [model.forward]  # a container of torch.nn is compiled through a wrapper that all containers share
    elif not isinstance(root, nn.Module):
        own.update(_graphs(root, backend, seen))  # all that a function's code has is the function's
    modules = called_modules(root)
    starts += [start for outer in modules for module in outer.modules() for start in (module.forward, *_methods(module))]
    candidates = dict(found for start in starts for found in _graphs(start, backend, seen))
    parameters = [p for module in modules for p in module.parameters()]
    fitting = {at: graph for at, graph in candidates.items() if graph.fits(parameters)}
    if not any(graph.compiled_for(parameters) for graph in fitting.values()):
        if isinstance(model, nn.Module) and not any(map(_is_compiled, model.modules())):
            return own, seen  # a copy of a compiled module: deepcopy and pickle lose what `Module.compile` did
    else:
        # The rest of a frame after a graph break may hold no parameter at all.
        fitting = {at: graph for at, graph in fitting.items() if graph.compiled_for(parameters) or not graph.parameters}
    return own | fitting, seen


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None or innermost_fn(module.forward) != module.forward


def _methods(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The functions of a module's own classes: one that `forward` calls after a graph break, or around one, is a frame of its own."""
    for cls in type(module).__mro__:
        if not cls.__module__.startswith("torch."):
            yield from (member for member in vars(cls).values() if inspect.isfunction(member))


def _backend(model: Callable[..., Any]) -> Any:
    """The backend with its options as `torch.compile` wrapped it, so that another compile of the same code is left out; None if unknown."""
    if isinstance(model, OptimizedModule):
        callback: Any = model.dynamo_ctx.callback
    else:
        function = model._compiled_call_impl if isinstance(model, nn.Module) else model
        callback = inspect.getclosurevars(function).nonlocals.get("callback") if inspect.isfunction(function) else None
    return None if callback is None else innermost_backend(callback)


def _graphs(function: Any, backend: Any, seen: set[types.CodeType]) -> Iterator[tuple[_At, CompiledGraph]]:
    """(when it was compiled, graph) for a frame, what a decorator wraps in it, and the frames that go on after its graph breaks."""
    function = innermost_fn(function)
    if hasattr(function, "__wrapped__"):
        yield from _graphs(function.__wrapped__, backend, seen)
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType) or function.__code__ in seen:
        return
    seen.add(function.__code__)
    for entry in _debug_get_cache_entry_list(function.__code__):
        if entry.code is None or (backend is not None and entry.backend != backend):
            continue
        for name in entry.code.co_names:
            target: Any = function.__globals__.get(name)
            if name.startswith("__compiled_fn_"):
                for i, graph in enumerate(_behind(target)):
                    yield (entry.compile_id.frame_id or 0, entry.compile_id.frame_compile_id or 0, i), graph
            elif name.startswith("__resume_at_"):
                yield from _graphs(target, backend, seen)


def _behind(function: Any) -> Iterator[CompiledGraph]:
    """The compiled graphs that a global of Dynamo's calls. For weights with a `__torch_function__` of their own it is held in a closure;
    DDPOptimizer makes a module that calls one for each bucket of gradients."""
    function = innermost_fn(function)
    if isinstance(function, CompiledGraph):
        yield function
    elif isinstance(splits := getattr(function, "__self__", None), nn.Module):
        for module in splits.modules():
            yield from (held for held in vars(module).values() if isinstance(held, CompiledGraph))
    elif isinstance(function, types.FunctionType):
        for held in inspect.getclosurevars(function).nonlocals.values():
            if callable(held):
                yield from _behind(held)
