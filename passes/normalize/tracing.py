"""Runs a graph that Dynamo captured under make_fx; what tracing can't see is recorded as it stands, so that nothing is lost.

Tracing records what is dispatched. What is not (`x.data`, a switch of SDPA's kernels, a version counter set back) leaves no node, and what
it returns would become a constant of the new graph. So a call that recorded nothing is recorded itself, unless it is plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback
from torch import fx
from torch._dynamo.exc import TorchDynamoException
from torch._guards import detect_fake_mode
from torch._higher_order_ops.utils import reenter_make_fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, has_proxy_slot, set_meta, track_tensor_tree
from torch.fx.node import base_types
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sptc.passes.graph.modes import remember_autocast
from sptc.passes.graph.pattern import CHECKPOINT


class Untraceable(Exception):
    """A graph can't be traced again.

    Attributes:
        node: of the graph that Dynamo captured, at which tracing stopped.
        reason: what went wrong.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.format_node()}: {reason}")
        self.node, self.reason = node, reason


_MODE_CHANGES = (_enter_autocast, _exit_autocast, torch._C._set_grad_enabled)
_PLAIN_PYTHON = frozenset({"_operator", "builtins", "math"})
_PLAIN_VALUES = (*base_types, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Tensor, slice, range, type(None))


@dataclass(frozen=True)
class _Opaque:
    """What a call returned that no graph can hold, such as an autocast block, and its node."""

    value: Any
    proxy: fx.Proxy


@dataclass(frozen=True)
class _Subclass:
    """What a call returned that is of a tensor subclass: its node alone, since what its owner does with it is no business of ours."""

    proxy: fx.Proxy


def _tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None, "normalize runs under make_fx"
    return mode.tracer


class Lowering(fx.Interpreter):
    """Interprets a Dynamo graph under make_fx.

    Raises:
        Untraceable: a node of the graph, or of a checkpoint body in it, can't be traced. Modes that the graph switched are switched back.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._entered: list[Any] = []  # autocast blocks
        self._node = next(iter(gm.graph.nodes))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        grad = torch.is_grad_enabled()
        try:
            return super().run(*args, **kwargs)
        except BaseException as error:
            with torch._C.DisableTorchFunction():
                for block in reversed(self._entered):
                    _exit_autocast(block)
                torch._C._set_grad_enabled(grad)
            if isinstance(error, (Untraceable, TorchDynamoException)) or not isinstance(error, Exception):
                raise  # Dynamo restarts a capture by exceptions of its own
            first, *_ = str(error).strip().splitlines() or [""]
            raise Untraceable(self._node, f"{type(error).__name__}: {first}") from error

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _MODE_CHANGES:
            return self._change_mode(target, args, kwargs)
        if isinstance(target, torch._ops.HigherOrderOperator):
            if target is CHECKPOINT:
                args = (_lower_body(*args), *args[1:])
            return self._record(target, args, kwargs)
        return self._call("call_function", target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call("call_method", target, args, kwargs)

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(leaf, _Subclass) for leaf in pytree.tree_leaves(args)):
            raise Untraceable(self._node, "the graph returns a tensor of a subclass")
        return super().output(target, args, kwargs)

    def _call(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tensors of a subclass, such as quantized weights, are inputs of the calls that they stand in: tracing would look into them."""
        if any(isinstance(leaf, _Subclass) or is_traceable_wrapper_subclass(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._record(target, args, kwargs, kind)
        return self._seen(kind, target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor that the graph holds, such as an optimizer's state: itself in the new graph too, a fake while tracing."""
        held = super().get_attr(target, args, kwargs)
        if not isinstance(held, torch.Tensor) or isinstance(held, FakeTensor):
            return held
        tracer = _tracer()
        fake_mode = detect_fake_mode()
        assert fake_mode is not None
        with disable_proxy_modes_tracing():
            fake = fake_mode.from_tensor(held, static_shapes=True)
        if has_proxy_slot(fake, tracer):  # an input too, or held under two names
            return fake
        name = str(target).replace(".", "_")
        while hasattr(tracer.root, name):
            name += "_"
        if isinstance(held, torch.nn.Parameter):
            tracer.root.register_parameter(name, held)
        else:
            tracer.root.register_buffer(name, held)
        return track_tensor_tree(fake, tracer.create_proxy("get_attr", name, (), {}), constant=None, tracer=tracer)

    def _seen(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call; record it as it stands if tracing saw nothing of it, though it did something or made a tensor."""
        tracer = _tracer()
        size = len(tracer.graph.nodes)
        bare, options = pytree.tree_map_only(_Opaque, lambda o: o.value, (args, kwargs))
        out = getattr(super(), kind)(target, bare, options)
        leaves = pytree.tree_leaves(out)
        unseen = [t for t in leaves if isinstance(t, FakeTensor) and not has_proxy_slot(t, tracer)]
        if len(tracer.graph.nodes) > size:
            if unseen:
                raise Untraceable(self._node, "it returns a tensor that was made out of sight of the tracer")
            return out
        opaque = not all(isinstance(leaf, _PLAIN_VALUES) for leaf in leaves)
        if not (unseen or opaque or _acts(kind, target, out)):
            return out
        passed = pytree.tree_map(_proxy, (args, kwargs))
        proxy = tracer.create_proxy(kind, target, *passed)
        if unseen:
            return track_tensor_tree(out, proxy, constant=None, tracer=tracer)
        if isinstance(out, torch.Tensor):
            set_meta(proxy, out)
        return _Opaque(out, proxy) if opaque else out

    def _change_mode(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take effect, so that what follows is traced with its dtypes, and be one node of the graph at hand.

        make_fx's own recording always writes to the outermost graph: a switch inside a checkpoint's body would leave the body.
        """
        node = _tracer().create_proxy("call_function", target, *pytree.tree_map(_proxy, (args, kwargs)))
        args, kwargs = pytree.tree_map_only(_Opaque, lambda o: o.value, (args, kwargs))
        with torch._C.DisableTorchFunction():
            out = target(*args, **kwargs)
        if target is _enter_autocast:
            self._entered.append(out)
        elif target is _exit_autocast:
            self._entered.remove(args[0])
        return _Opaque(out, node)

    def _record(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: str = "call_function") -> Any:
        """One node for a call that is not run, such as a higher-order one; its result is what Dynamo saw."""
        tracer = _tracer()
        fake_mode = detect_fake_mode()
        with disable_proxy_modes_tracing():
            out = pytree.tree_map(lambda t: _same_metadata(t, fake_mode), self._node.meta.get("example_value"))
        call = tracer.create_proxy(kind, target, *pytree.tree_map(_proxy, (args, kwargs)))
        return _tracked(out, call)


def _tracked(out: Any, proxy: fx.Proxy) -> Any:
    if out is _Subclass:
        return _Subclass(proxy)
    if any(leaf is _Subclass for leaf in pytree.tree_leaves(out)):
        return [_tracked(item, proxy[i]) for i, item in enumerate(out)]
    return track_tensor_tree(out, proxy, constant=None, tracer=_tracer())


def _proxy(argument: Any) -> Any:
    """What stands for an argument in the graph at hand; a body is registered with it."""
    tracer = _tracer()
    if isinstance(argument, (_Opaque, _Subclass)):
        return argument.proxy
    if isinstance(argument, fx.GraphModule):
        name = tracer.get_fresh_qualname("body")
        tracer.root.register_module(name, argument)
        return tracer.create_proxy("get_attr", name, (), {})
    return tracer.unwrap_proxy(argument)


def _acts(kind: str, target: Any, out: Any) -> bool:
    """Whether a call that recorded nothing and made no tensor is more than arithmetic of sizes or the choice of an element."""
    if kind == "call_method":
        return str(target).endswith("_") and not str(target).endswith("__")
    return getattr(target, "__module__", None) not in _PLAIN_PYTHON and (out is None or isinstance(out, torch.Tensor))


def _lower_body(body: fx.GraphModule, *args: Any) -> fx.GraphModule:
    """The body of a checkpoint, normalized. (PyTorch's own rule for tracing it would warn of a context function that nobody passed.)"""

    def run(*inputs: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return Lowering(body).run(*inputs)

    lowered = reenter_make_fx(run)(*args)
    remember_autocast(lowered)
    lowered.meta.update(body.meta)  # a selective checkpoint's policy among it
    return lowered


def _same_metadata(t: Any, fake_mode: FakeTensorMode | None) -> Any:
    if not isinstance(t, torch.Tensor):
        return t
    if is_traceable_wrapper_subclass(t):
        return _Subclass
    assert fake_mode is not None
    with fake_mode:
        out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return out.requires_grad_() if t.requires_grad else out
