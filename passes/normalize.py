"""From Dynamo's graph to one ATen graph before autograd: every spelling of a layer becomes the same few operators.

The graph that Dynamo captures mixes methods, functions and modules' internals. Tracing it once more below Python and above autograd
(`make_fx(pre_dispatch=True)`) gives ATen operators with composite ones (`linear`, `scaled_dot_product_attention`, `dropout`) kept whole.
Placeholders keep order, identity and Dynamo's metadata; bodies of activation checkpoints are normalised too; other higher-order operators
are kept as they are, since inlining their forward would lose the backward that the user wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx.traceback
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, detect_fake_mode
from torch._higher_order_ops.utils import reenter_make_fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx, track_tensor_tree
from torch.utils import _pytree as pytree

from sptc.passes.lower_einsum import lower_einsum
from sptc.passes.site import site_of
from sptc.passes.unit import Unit
from sptc.passes.unmerge_heads import unmerge_heads
from sptc.region import Refusal

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def lower(unit: Unit) -> Unit:
    """The unit with its graph normalized; higher-order operators, whose bodies no pass looks into, become refusals."""
    opaque = [n for module in unit.gm.modules() if isinstance(module, fx.GraphModule) for n in module.graph.nodes if _is_higher_order(n)]
    refusals = tuple(
        Refusal("graph", "higher-order", n, f"{_name(n)} is kept as it is; nothing inside it is rewritten", site_of([n])) for n in opaque
    )
    if any(_name(n) in _UNTRACEABLE for n in opaque):
        return replace(unit, refusals=refusals, closed=True)
    return replace(unit, gm=normalize(unit.gm, unit.example_inputs), refusals=refusals)


# Their graphs hold vmapped constants (block masks) that can't be traced once more; the whole graph goes to Inductor as captured.
_UNTRACEABLE = frozenset({"flex_attention", "flex_attention_backward", "_vmap_increment_nesting"})


def _is_higher_order(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is CHECKPOINT:
        return False
    return isinstance(node.target, torch._ops.HigherOrderOperator) or _name(node) in _UNTRACEABLE


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """A new ATen graph that computes what `gm` computes, gradients included; `gm` is left untouched.

    Args:
        gm: the graph a Dynamo backend receives.
        example_inputs: one tensor, SymInt or number a placeholder, as a Dynamo backend receives them.

    Raises:
        Whatever tracing raises; control-flow exceptions of Dynamo (restarts) pass through.
    """
    fake_mode, fakes = _fake_inputs(example_inputs)

    def run(*args: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return _Lowering(gm).run(*args)

    with fake_mode, enable_python_dispatcher():
        graph = make_fx(run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    _keep_dynamo_metadata(gm, graph)
    for module in graphs(graph):
        module.graph.eliminate_dead_code()  # a value that no one uses, such as averaged attention weights, is no second use of its input
        lower_einsum(module)
        unmerge_heads(module)
    return graph


def checkpoint_bodies(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.GraphModule]]:
    """The (call, body) pairs of activation checkpoints directly in `gm`."""
    return [
        (node, getattr(gm, str(node.args[0].target)))
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target is CHECKPOINT and isinstance(node.args[0], fx.Node)
    ]


def graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """`gm` and the bodies of its activation checkpoints, nested ones included, outermost first."""
    return [gm, *(inner for _, body in checkpoint_bodies(gm) for inner in graphs(body))]


_MODE_CHANGES = (_enter_autocast, _exit_autocast, torch._C._set_grad_enabled)


@dataclass(frozen=True)
class _Mode:
    """What a mode change returned, and its node."""

    value: Any
    proxy: fx.Proxy


def _tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None, "normalize runs under make_fx"
    return mode.tracer


class _Lowering(fx.Interpreter):
    """Runs a Dynamo graph under make_fx; what must not be traced through is recorded as one node."""

    _node: fx.Node

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
        return super().call_function(target, args, kwargs)

    def _change_mode(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take effect, so that what follows is traced with its dtypes, and be one node of the graph at hand.

        make_fx's own recording always writes to the outermost graph: a switch inside a checkpoint's body would leave the body.
        """
        node = _tracer().create_proxy("call_function", target, *pytree.tree_map_only(_Mode, lambda m: m.proxy, (args, kwargs)))
        args, kwargs = pytree.tree_map_only(_Mode, lambda m: m.value, (args, kwargs))
        with torch._C.DisableTorchFunction():
            return _Mode(target(*args, **kwargs), node)

    def _record(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node for a higher-order call; its result is what Dynamo saw, its body is not run."""
        tracer = _tracer()
        fake_mode = detect_fake_mode([a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)])
        with disable_proxy_modes_tracing():
            out = pytree.tree_map(lambda t: _same_metadata(t, fake_mode), self._node.meta["example_value"])

        def proxy(a: Any) -> Any:
            if isinstance(a, fx.GraphModule):
                name = tracer.get_fresh_qualname("body")
                tracer.root.register_module(name, a)
                return tracer.create_proxy("get_attr", name, (), {})
            return tracer.unwrap_proxy(a)

        call = tracer.create_proxy("call_function", target, pytree.tree_map(proxy, args), pytree.tree_map(proxy, kwargs))
        return track_tensor_tree(out, call, constant=None, tracer=tracer)


def _lower_body(body: fx.GraphModule, *args: Any) -> fx.GraphModule:
    """The body of a checkpoint, normalized. (PyTorch's own rule for tracing it would warn of a context function that nobody passed.)"""

    def run(*inputs: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return _Lowering(body).run(*inputs)

    lowered = reenter_make_fx(run)(*args)
    lowered.meta.update(body.meta)  # a selective checkpoint's policy among it
    return lowered


def _fake_inputs(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """The inputs as fakes of the mode that AOTAutograd will use, so that symbolic sizes stay the same objects."""
    tracing = TracingContext.try_get()
    mode = (tracing.fake_mode if tracing else None) or detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    fakes = []
    for value in example_inputs:
        if isinstance(value, torch.Tensor) and not (isinstance(value, FakeTensor) and value.fake_mode is mode):
            context = tracing.tensor_to_context.get(value) if tracing and value in tracing.tensor_to_context else None
            source = context.tensor_source if context is not None else None
            value = mode.from_tensor(value, symbolic_context=context, source=source, trace=context is None)
        fakes.append(value)
    return mode, fakes


def _same_metadata(t: Any, fake_mode: FakeTensorMode | None) -> Any:
    if not isinstance(t, torch.Tensor):
        return t
    assert fake_mode is not None
    with fake_mode:
        out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return out.requires_grad_() if t.requires_grad else out


def _keep_dynamo_metadata(gm: fx.GraphModule, graph: fx.GraphModule) -> None:
    """What AOTAutograd and Inductor read of Dynamo's graph: sources of placeholders, static inputs, names of constants."""
    old = gm.graph.find_nodes(op="placeholder")
    new = graph.graph.find_nodes(op="placeholder")
    if len(old) != len(new):
        raise AssertionError(f"normalizing changed the number of inputs from {len(old)} to {len(new)}")
    for a, b in zip(old, new, strict=True):
        b._dynamo_source = getattr(a, "_dynamo_source", None)
        for key in ("grapharg", "tensor_dict"):
            if key in a.meta:
                b.meta[key] = a.meta[key]
    graph.meta.update(gm.meta)
    sources = dict(getattr(gm, "_param_name_to_source", None) or {})
    for name, _ in [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]:
        sources.setdefault(name, ConstantSource(name))  # AOTAutograd insists on a source for each constant that tracing lifted
    graph._param_name_to_source = sources
    for name in ("_source_to_user_stacks", "_backend_id", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(graph, name, getattr(gm, name))
