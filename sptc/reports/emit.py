"""Emit the kernels that a rewritten graph will launch, so that a compile shows them and says where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from sptc.codegen.ops.autocast import cast_positions
from sptc.codegen.ops.launches import launches_of
from sptc.codegen.triton.run.launch import Launch
from sptc.codegen.triton.run.precompile import precompile
from sptc.codegen.triton.spec import KernelSpec
from sptc.codegen.triton.target import runs_kernels, target_of, targeting
from sptc.ir.hint import optimization_hint
from sptc.ir.region import Site
from sptc.passes.graph.frame import graphs
from sptc.passes.graph.modes import autocast_dtype
from sptc.passes.graph.pattern import op, requires_grad, value
from sptc.passes.graph.site import site_of
from sptc.passes.unit import Unit

_SHOWN = frozenset({"q", "k", "v"})  # arguments whose shapes tell a reader what a kernel was made for


@dataclass(frozen=True)
class EmittedKernel:
    """A kernel, the calls of sparse operators that launch it, one line each, and its source with both in its header."""

    spec: KernelSpec
    origins: tuple[str, ...]
    source: str


def emit(unit: Unit, device: torch.device) -> tuple[EmittedKernel, ...]:
    """Emit the kernels that the sparse operators of `unit` launch on `device`, backward included, as the cache has them from now on.

    For a GPU they are compiled, too, so that the first step need not wait for one after the other. Shapes are those that the graph was
    captured with: another length may need a further kernel, which is emitted when it is launched.
    Empty for a device that runs no kernels.

    Raises:
        triton.CompilationError: an emitted kernel is not valid Triton.
    """
    if not runs_kernels(device):
        return ()
    origins: dict[KernelSpec, list[str]] = {}
    launches: list[Launch] = []
    with targeting(target_of(device)):
        sites = _sites(unit)
        for gm in graphs(unit.gm):
            for node, arguments in _calls(gm):
                called = launches_of(node.target, arguments)
                launches += called
                for launch in called:
                    origins.setdefault(launch.spec, []).append(_origin(node, arguments, sites))
    kernels = tuple(_emitted(spec, tuple(dict.fromkeys(lines)), device) for spec, lines in origins.items())
    if device.type == "cuda":
        precompile(launches, target_of(device))
    return kernels


def _emitted(spec: KernelSpec, origins: tuple[str, ...], device: torch.device) -> EmittedKernel:
    from sptc.codegen.triton.run.load import header, load  # imports Triton
    from sptc.codegen.triton.source.specialize import specialize

    text = "\n".join(f"for {origin}" for origin in origins)
    load(spec, interpret=device.type == "cpu", origin=text)
    return EmittedKernel(spec, origins, header(spec, text) + specialize(spec))


def _calls(gm: fx.GraphModule) -> Iterator[tuple[Node, tuple[Any, ...]]]:
    """Calls of sparse operators with their arguments, tensors on "meta", in the dtypes that autocast will make of them."""
    for node in gm.graph.nodes:
        if op(node).startswith("sptc."):
            positions = cast_positions(node.target)
            casts = {kind: autocast_dtype(node, kind) for kind in ("cpu", "cuda")}
            yield node, tuple(_concrete(arg, casts if i in positions else {}) for i, arg in enumerate(node.args))


def _concrete(argument: Any, casts: Mapping[str, torch.dtype | None]) -> Any:
    """The value of an argument without data and without symbols, so that looking at it can't add a guard."""
    if isinstance(argument, list | tuple):
        return [_concrete(item, casts) for item in argument]
    known = value(argument)
    if isinstance(known, torch.SymInt | torch.SymFloat):
        return optimization_hint(known)
    if not isinstance(known, Tensor):
        return known
    shape, stride = ([optimization_hint(s) for s in sizes] for sizes in (known.shape, known.stride()))
    dtype = known.dtype
    if dtype.is_floating_point and dtype != torch.float64:
        dtype = casts.get(known.device.type) or dtype
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta", requires_grad=_trains(argument))


def _trains(node: Node) -> bool:
    """Whether a gradient will be asked for: as the capture saw it; for nodes that the passes wrote, if one of their inputs needs it."""
    known = value(node)
    if (
        not isinstance(known, Tensor)
        or not known.dtype.is_floating_point
        or not torch.is_grad_enabled()
        or op(node) == "aten.detach.default"
    ):
        return False
    if "tensor_meta" in node.meta or "grapharg" in node.meta:
        return requires_grad(node)
    return node.op == "placeholder" or any(_trains(n) for n in node.all_input_nodes)


def _sites(unit: Unit) -> dict[Any, Site]:
    """Sites of rewritten regions by what their nodes have in common with the nodes that replaced them."""
    return {_place(d.region.y): d.region.site for d in unit.decisions if d.rewrite}


def _place(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta.get("nn_module_stack") or ()), node.meta.get("stack_trace")


def _origin(node: Node, arguments: tuple[Any, ...], sites: dict[Any, Site]) -> str:
    site = sites.get(_place(node)) or site_of([node])
    names = [argument.name for argument in node.target._schema.arguments]
    shapes = [f"{name} {list(x.shape)}" for name, x in zip(names, arguments, strict=False) if isinstance(x, Tensor) and name in _SHOWN]
    dtype = next(str(x.dtype).removeprefix("torch.") for x in arguments if isinstance(x, Tensor))
    where = site.module or "the root module"
    return f"{where}{f' ({site.source})' if site.source else ''}: {node.target._schema.name} of {', '.join(shapes)}, {dtype}"
