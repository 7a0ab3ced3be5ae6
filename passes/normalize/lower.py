"""From Dynamo's graph to one ATen graph before autograd: every spelling of a layer becomes the same few operators.

The graph that Dynamo captures mixes methods, functions and modules' internals. Tracing it once more below Python and above autograd
(`make_fx(pre_dispatch=True)`) gives ATen operators with composite ones (`linear`, `scaled_dot_product_attention`, `dropout`) kept whole.
Placeholders keep order, identity and Dynamo's metadata; bodies of activation checkpoints are normalised too; other higher-order operators
are kept as they are, since inlining their forward would lose the backward that the user wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx.traceback
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sptc.ir.region import Refusal
from sptc.passes.graph.effects import alias_sets, remove_dead_code, written_by
from sptc.passes.graph.frame import checkpoint_bodies, graphs
from sptc.passes.graph.pattern import CHECKPOINT
from sptc.passes.graph.site import site_of
from sptc.passes.normalize.einsum import lower_einsum
from sptc.passes.normalize.tracing import Lowering, Untraceable
from sptc.passes.normalize.unmerge_heads import unmerge_heads
from sptc.passes.unit import Unit


def lower(unit: Unit) -> Unit:
    """The unit with its graph normalized; higher-order operators, whose bodies no pass looks into, become refusals.

    A graph that can't be traced again is closed: it stays as it was captured.

    Raises:
        Untraceable: in place of closing the graph, with option on_error="raise".
    """
    opaque = [n for module in unit.gm.modules() if isinstance(module, fx.GraphModule) for n in module.graph.nodes if _is_higher_order(n)]
    refusals = tuple(
        Refusal("graph", "higher-order", n, f"{_name(n)} is kept as it is; nothing inside it is rewritten", site_of([n])) for n in opaque
    )
    vmapped = next((refusal for refusal in refusals if _name(refusal.node) in _UNTRACEABLE), None)
    if vmapped is not None:
        return replace(unit, refusals=refusals, closed=vmapped)
    try:
        return replace(unit, gm=normalize(unit.gm, unit.example_inputs), refusals=refusals)
    except Untraceable as stop:
        if unit.config.on_error == "raise":
            raise
        reason = f"{_name(stop.node)} can't be traced again ({stop.reason}); nothing in its graph is rewritten"
        refusal = Refusal("graph", "untraceable", stop.node, reason, site_of([stop.node]))
        return replace(unit, refusals=(*refusals, refusal), closed=refusal)


# Their graphs hold tensors of torch.func's transforms (vmapped block masks, what is differentiated), which no pass can look into; the whole
# graph goes to Inductor as captured.
_UNTRACEABLE = frozenset(
    {"flex_attention", "flex_attention_backward", "_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting"}
)


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
        Untraceable: part of `gm` can't be traced again; control-flow exceptions of Dynamo (restarts) pass through.
    """
    fake_mode, fakes = _fake_inputs(example_inputs)

    def run(*args: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return Lowering(gm).run(*args)

    # What autograd saves here is never read: hooks of the user that pack it would only see fakes.
    with fake_mode, enable_python_dispatcher(), _disable_saved_tensors_hooks_during_tracing():
        graph = make_fx(run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    _keep_dynamo_metadata(gm, graph)
    for module in graphs(graph):
        _tell_static_operands(module)
        _check_constants(module)
        remove_dead_code(module.graph)  # a value that no one uses, such as averaged attention weights, is no second use of its input
        _forget_detaching_constants(module.graph)
        _let_views_copy(module.graph)
        lower_einsum(module)
        unmerge_heads(module)
    return graph


def _forget_detaching_constants(graph: fx.Graph) -> None:
    """Take away the `detach_` with which a number in the user's code, `torch.tensor(0.0)`, is traced: a write that changes nothing."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        constant = node.args[0]
        if isinstance(constant, fx.Node) and constant.target is torch.ops.aten.lift_fresh_copy.default:
            node.replace_all_uses_with(constant)
            graph.erase_node(node)


def _let_views_copy(graph: fx.Graph) -> None:
    """Make `view` of every node a `reshape`, which is the same wherever `view` is possible.

    `contiguous` of what already is contiguous leaves no node, so the view after it counts on the strides of the operator before. Sparse
    operators have other strides. (`F.multi_head_attention_forward` is written so before torch 2.13.) What is written to in place stays a
    view: a write to a copy would be lost.
    """
    written = [target for node in graph.nodes for target in written_by(node)]
    aliases = alias_sets(graph) if written else {}
    changed = {aliases[target] for target in written}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        if not written or aliases[node] not in changed:
            node.target = torch.ops.aten.reshape.default


def _check_constants(gm: fx.GraphModule) -> None:
    """No constant is a fake: that would be a tensor whose making went unseen, and what is written to it or read of it would be lost."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(gm, str(node.target), None), FakeTensor):
            raise Untraceable(next(iter(node.users), node), "it uses a tensor that was made out of sight of the tracer")


def _tell_static_operands(gm: fx.GraphModule) -> None:
    """Let checkpoint bodies know which of their inputs are parameters, as the graph around them does: outermost first."""
    for call, body in checkpoint_bodies(gm):
        for inner, operand in zip(body.graph.find_nodes(op="placeholder"), call.args[1:], strict=True):
            if isinstance(operand, fx.Node) and operand.op == "placeholder" and "tensor_dict" in operand.meta:
                inner.meta["tensor_dict"] = operand.meta["tensor_dict"]


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
