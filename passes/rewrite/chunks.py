"""An FFN region in chunks of its tokens: backward holds the hidden values of a chunk, and not of all tokens (`codegen/ops/chunks.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_arg

from sptc.ir.program import Call, Program, Value
from sptc.ir.region import FfnRegion, Projection
from sptc.passes.graph.modes import autocast_like
from sptc.passes.graph.pattern import requires_grad, shape, value
from sptc.passes.rewrite.write_ffn import Ffn, Part, Tensors

_ANY = 7  # rows that programs are written with; they hold for any number


@dataclass(frozen=True)
class Chunked:
    """A region over some of its hidden units as `sptc::in_chunks` takes it, `chunk` tokens at a time."""

    units: int
    rows: tuple[Node, ...]  # operands that have a row for each token
    others: tuple[Node, ...]
    forward: str
    backward: str
    width: int
    dtype: torch.dtype
    chunk: int
    need: tuple[bool, ...]
    scaled: tuple[tuple[Node, Node], ...]  # operands of adapters, and the numbers of the graph that they are multiplied with

    def __call__(self, t: Tensors, part: Part, chosen: Tensor | None) -> Tensor:
        """The outputs of a part's tokens."""
        scaling = dict(self.scaled)

        def operand(node: Node) -> Any:
            return t[node] * t[scaling[node]] if node in scaling else t[node]

        rows, others = [part.tokens(operand(node)) for node in self.rows], [*map(operand, self.others)]
        others += [] if chosen is None else [chosen]
        y: Tensor = torch.ops.sptc.in_chunks(rows, others, self.forward, self.backward, self.width, self.dtype, self.chunk, self.need)
        return y


def in_chunks(region: FfnRegion, chunk: int, part: Callable[[Tensor | None], Part], units: int) -> Chunked:
    """Write the programs of a region over `units` of its hidden units.

    Args:
        part: of all rows at hand, and of the hidden units whose numbers it is given; None: of all.
    """
    some, scaled = units < region.hidden, _scaled(region)
    region = replace(region, ups=tuple(map(_unscaled, region.ups)), down=_unscaled(region.down))
    down, adapters = region.down, [p.lora for p in (*region.ups, region.down) if p.lora is not None]
    rows = tuple(dict.fromkeys([region.x, *(up.lora.low for up in region.ups if up.lora is not None)]))
    named = [*(n for p in (*region.ups, down) for n in (p.weight, p.bias)), *(a.b for a in adapters)]
    named += [] if down.lora is None else [down.lora.a]
    others = tuple(dict.fromkeys(node for node in named if node is not None))
    need = tuple(requires_grad(node) for node in (*rows, *others)) + (False,) * some

    def function(*given: Tensor) -> tuple[Tensor]:
        t: dict[Node | None, Any] = {None: None, **dict(zip((*rows, *others), given, strict=False))}
        return (Ffn(region, t, part(given[-1] if some else None)).output(),)

    def gradients(grad: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip(given, need, strict=True)]
            asked = [x for x, wanted in zip(leaves, need, strict=True) if wanted]
            return torch.autograd.grad(function(*leaves), asked, grad)

    device, sizes = value(region.y).device, ShapeEnv()
    symbol = sizes.create_symbol(_ANY, ConstantSource("rows"), DimDynamic.DYNAMIC)
    with autocast_like(region.y, device.type), torch.no_grad(), FakeTensorMode(shape_env=sizes):
        given = [_some_rows(value(node), sizes.create_symintnode(symbol, hint=_ANY)) for node in rows]
        given += [_alike(value(node)) for node in others]
        if some:
            given.append(torch.empty(units, dtype=torch.int64, device=device))
        forward, (y,) = _written(function, given)
        backward = _written(gradients, [torch.empty_like(y), *given])[0] if any(need) else ""
    return Chunked(units, rows, others, forward, backward, int(shape(region.y)[-1]), y.dtype, chunk, need, scaled)


def _scaled(region: FfnRegion) -> tuple[tuple[Node, Node], ...]:
    """What numbers of the graph, which no program can hold, are multiplied with instead: what B is given, or B itself."""
    found = [(up.lora.low, up.lora.scaling) for up in region.ups if up.lora is not None]
    found += [] if region.down.lora is None else [(region.down.lora.b, region.down.lora.scaling)]
    return tuple((operand, number) for operand, number in found if isinstance(number, Node))


def _unscaled(projection: Projection) -> Projection:
    if projection.lora is None or not isinstance(projection.lora.scaling, Node):
        return projection
    return replace(projection, lora=replace(projection.lora, scaling=1.0))


def _some_rows(x: Tensor, rows: Any) -> Tensor:
    """A fake like the operand x [..., features] of as many rows."""
    return torch.empty(rows, int(x.shape[-1]), dtype=x.dtype, device=x.device)


def _alike(x: Tensor) -> Tensor:
    return torch.empty_strided(tuple(map(int, x.shape)), tuple(map(int, x.stride())), dtype=x.dtype, device=x.device)


def _written(function: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """A function of fakes as a program, and what it gives for them."""
    graph = make_fx(function)(*given).graph
    graph.eliminate_dead_code()
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    number: dict[Node, Value] = {}
    count, calls = 0, list[Call]()
    for node in graph.nodes:
        if node is output:
            break
        args, kwargs = map_arg((node.args, node.kwargs), number.get)
        if node.target is torch.ops.aten.detach.default:
            number[node] = args[0]
            continue
        number[node] = Value(count)
        count += 1
        if node.op == "placeholder":
            continue
        if not (isinstance(node.target, OpOverload) and node.target.namespace == "aten"):
            raise AssertionError(f"an FFN in chunks has {node.format_node()}, which is no ATen operator")
        calls.append(Call(str(node.target).removeprefix("aten."), args, kwargs))
    return str(Program(tuple(calls), tuple(number[result].number for result in results))), [value(result) for result in results]
