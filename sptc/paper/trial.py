"""Runs of the example batch for `prepare`: one that gathers what trainable state starts from, one that checks that the state arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.fx import Node

from sptc.ir.region import AttentionRegion, Decision, FfnRegion, FfnSettings, LossRegion, Refusal, Region, RouterState
from sptc.paper.fit import fit_codebooks, fit_router, fit_stand_in
from sptc.paper.state import Codebook, Router
from sptc.passes.bind import holder
from sptc.passes.decide.settings import routes
from sptc.passes.graph.frame import Frame, frames, input_index, outermost, parameter
from sptc.passes.graph.pattern import CHECKPOINT, shape
from sptc.passes.unit import Unit

SAMPLED_ROWS = 4096  # tokens of an FFN, or vectors of a key head, that the start of the state is computed from

Judge = Callable[[fx.GraphModule, list[Any]], Unit]


@dataclass
class Sample:
    """What the example batch shows of a region, until the state's start is fitted to it: when all calls that a graph holds were seen.

    Calls of the same region in later graphs find it fitted.
    """

    fit: Callable[[dict[str, list[Tensor]]], Router | Codebook]
    parts: dict[str, int]  # what is shown, and how often by one call
    calls: int = 0
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    slot: Router | Codebook | None = None

    def add(self, part: str, value: Tensor) -> None:
        self.seen.setdefault(part, []).append(value)
        if all(len(self.seen.get(name, ())) == times * self.calls for name, times in self.parts.items()):
            with torch.autocast(value.device.type, enabled=False):  # the graph may have it on just here
                self.slot = self.fit(self.seen)
            self.seen.clear()


def _fit_router(seen: dict[str, list[Tensor]], name: str, settings: FfnSettings) -> Router:
    """From inputs [N, d], hidden [N, d_ff] units and the down weight [d_ff, d_out], whose owner-local name is `name`."""
    x, hidden, down = torch.cat(seen["inputs"]), torch.cat(seen["hidden"]), seen["down"][0]
    start = fit_router(x, _block_norms(hidden, down, settings.blocks))
    missing = _missing(hidden, down, x.float() @ start[0].T + start[1], settings.active)
    low, high, constant = (t.to(down.dtype) for t in fit_stand_in(x, missing, settings.left_out or 1.0))
    return Router((start[0].to(down.dtype), start[1].to(down.dtype)), (low, high, constant), name)


def _fit_codebook(seen: dict[str, list[Tensor]]) -> Codebook:
    """From vectors [h_kv, N, d], queries and keys."""
    return Codebook(fit_codebooks(torch.cat(seen["vectors"], 1)))


class Trial:
    """The first run. `samples` maps the name of an owner to its slots: "attention<i>", or the local name of an FFN's down weight."""

    def __init__(self, model: nn.Module, judge: Judge) -> None:
        self.samples: dict[str, dict[str, Sample]] = {}
        self.refusals: list[Refusal] = []
        self._judge = judge
        self._modules = {str(id(module)): name for name, module in model.named_modules()}
        self._parameters: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            self._parameters.setdefault(id(p), []).append(name)

    def on_graph(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        unit = self._judge(gm, inputs)

        def call(*args: Any) -> Any:
            watched: dict[Node, list[Callable[[Tensor], None]]] = {}
            for node, see in self._watches(unit, args):
                watched.setdefault(node, []).append(see)
            with torch.no_grad():
                return _Watching(unit.gm, watched).run(*args)

        return call

    def _watches(self, unit: Unit, args: Sequence[Any]) -> Iterator[tuple[Node, Callable[[Tensor], None]]]:
        by_graph = {frame.gm.graph: frame for frame in frames(unit.gm)}
        moved = self._moves(unit.example_inputs, args)
        for decision in unit.decisions:
            region = decision.region
            if isinstance(region, LossRegion):
                continue
            stateless = unit.config.attention_selector != "pq" if isinstance(region, AttentionRegion) else not routes(unit, region)
            if not decision.rewrite or stateless:
                continue
            owner = self._owner(region, moved)
            if owner is None and region.site.owner and not holder(region):
                self._refuse(region, "only containers hold it, which call or count their modules; put it into a module of another class")
            elif owner is None:
                self._refuse(region, "a graph break separates it from the module that it belongs to")
            elif not owner and not torch._dynamo.config.wrap_top_frame:
                self._refuse(
                    region,
                    "it belongs to the outermost module, whose hooks Dynamo runs outside the graph; put that module into another one, "
                    "or set torch._dynamo.config.wrap_top_frame = True",
                )
            elif isinstance(region, AttentionRegion):
                yield from self._watch_attention(region, owner, unit)
            else:
                yield from self._watch_ffn(region, owner, decision, by_graph[region.y.graph], args)

    def _watch_attention(self, region: AttentionRegion, owner: str, unit: Unit) -> Iterator[tuple[Node, Callable[[Tensor], None]]]:
        call = [r for r in unit.regions if r.kind == "attention" and holder(r) == holder(region)]
        sample = self._sample(owner, f"attention{call.index(region)}", _fit_codebook, {"vectors": 2})
        if sample.slot is None:
            key_heads = int(shape(region.k)[-3])
            sample.calls += 1
            for node in (region.q, region.k):
                yield node, lambda value: sample.add("vectors", _vectors(value, key_heads))

    def _watch_ffn(
        self, region: FfnRegion, owner: str, decision: Decision, frame: Frame, args: Sequence[Any]
    ) -> Iterator[tuple[Node, Callable[[Tensor], None]]]:
        index = input_index(outermost(parameter(region.down.weight), frame))
        names = self._parameters.get(id(args[index]), []) if index is not None else []
        prefix = f"{owner}." if owner else ""
        down = next((name.removeprefix(prefix) for name in names if name.startswith(prefix)), None)
        if down is None:
            self._refuse(region, "its down weight is not a parameter of the module that holds the FFN")
            return
        assert isinstance(decision.settings, FfnSettings)
        fit = partial(_fit_router, name=down, settings=decision.settings)
        sample = self._sample(owner, down, fit, {"inputs": 1, "hidden": 1, "down": 1})
        if sample.slot is None:
            sample.calls += 1
            yield region.x, lambda value: sample.add("inputs", _tokens(value))
            yield region.down.x, lambda value: sample.add("hidden", _tokens(value))
            yield region.down.weight, lambda value: sample.add("down", value.detach() if region.down.transposed else value.detach().T)

    def _sample(self, owner: str, key: str, fit: Callable[..., Router | Codebook], parts: dict[str, int]) -> Sample:
        return self.samples.setdefault(owner, {}).setdefault(key, Sample(fit, parts))

    def _refuse(self, region: Region, reason: str) -> None:
        self.refusals.append(Refusal(region.kind, "state", region.y, f"no trainable state: {reason}", region.site))

    def _moves(self, compiled: Sequence[Any], args: Sequence[Any]) -> list[tuple[str, str]]:
        """Where Dynamo runs the graph of one module for another: (name of the module it was captured for, name of the one it runs for).

        After a graph break in a loop over layers one captured graph serves them all; parameters tell for which layer it runs.
        """
        moves = []
        for old, new in zip(compiled, args, strict=True):
            if old is new or id(old) not in self._parameters or id(new) not in self._parameters:
                continue
            before, after = (self._parameters[id(p)][0].split(".") for p in (old, new))
            while before and after and before[-1] == after[-1]:
                del before[-1], after[-1]
            moves.append((".".join(before), ".".join(after)))
        return sorted(set(moves), key=lambda move: -len(move[0]))

    def _owner(self, region: Region, moves: Sequence[tuple[str, str]]) -> str | None:
        """The name of the module that holds a region; None when there is none."""
        calls = holder(region)
        name = self._modules.get(calls[-1].partition("@")[0]) if calls else None
        if name is None or not moves:
            return name
        for before, after in moves:
            if name == before or name.startswith(f"{before}."):
                return after + name.removeprefix(before)
        return None


class Check:
    """The second run: `reached` holds the ids of the first tensor of each slot that a region to be rewritten receives."""

    def __init__(self, judge: Judge) -> None:
        self.units: list[Unit] = []
        self.reached: set[int] = set()
        self._judge = judge

    def on_graph(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        unit = self._judge(gm, inputs)
        self.units.append(unit)
        by_graph = {frame.gm.graph: frame for frame in frames(unit.gm)}
        rewritten = {d.region for d in unit.decisions if d.rewrite}
        used = [(state, by_graph[region.y.graph]) for region, state in unit.states.items() if region in rewritten]
        nodes = [outermost(state.weight if isinstance(state, RouterState) else state.codebooks, frame) for state, frame in used]
        indices = [index for node in nodes if (index := input_index(node)) is not None]

        def call(*args: Any) -> Any:
            self.reached.update(id(args[index]) for index in indices)
            with torch.no_grad():
                return _Watching(gm, {}).run(*args)

        return call


class _Watching(fx.Interpreter):
    """Runs a graph eagerly and without gradients, checkpoint bodies included, and shows the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, watched: dict[Node, list[Callable[[Tensor], None]]]) -> None:
        super().__init__(gm)
        self._watched = watched

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        for see in self._watched.get(n, ()):
            see(value)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is CHECKPOINT:
            return _Watching(args[0], self._watched).run(*args[1:])
        if target is torch._C._set_grad_enabled:
            return None  # the model's own no_grad ends here; ours does not
        return super().call_function(target, args, kwargs)


def _block_norms(hidden: Tensor, down: Tensor, blocks: int) -> Tensor:
    """hidden [N, d_ff], down [d_ff, d] -> [N, blocks]: the L2 norm of what each block of hidden units adds to the output."""
    parts = zip(hidden.float().chunk(blocks, 1), down.float().chunk(blocks), strict=True)
    return torch.stack([(units @ weights).norm(dim=1) for units, weights in parts], 1)


def _missing(hidden: Tensor, down: Tensor, logits: Tensor, active: int) -> Tensor:
    """What the blocks that the logits [N, blocks] leave out would add, fp32 [N, d_out]."""
    blocks = logits.shape[1]
    inactive = torch.ones_like(logits).scatter_(1, logits.topk(active, 1).indices, 0.0)
    return (hidden.float().unflatten(1, (blocks, -1)) * inactive.unsqueeze(2)).flatten(1) @ down.float()


def _vectors(value: Tensor, key_heads: int) -> Tensor:
    """Queries or keys [..., h, n, d] as [h_kv, N, d], query heads beside the key head that they share."""
    h, n, d = value.shape[-3:]
    b = value.numel() // (h * n * d)
    rows = value.reshape(b, key_heads, h // key_heads, n, d).transpose(0, 1).reshape(key_heads, -1, d)
    return _evenly(rows, SAMPLED_ROWS // 2, 1)


def _tokens(value: Tensor) -> Tensor:
    """Some of the rows of [..., d], as [N, d]."""
    return _evenly(value.reshape(-1, value.shape[-1]), SAMPLED_ROWS, 0)


def _evenly(rows: Tensor, count: int, dim: int) -> Tensor:
    """At most `count` rows, spread evenly over all, as a copy of their own."""
    size = rows.shape[dim]
    chosen = torch.linspace(0, size - 1, min(count, size), device=rows.device).round().long()
    return rows.detach().index_select(dim, chosen)
