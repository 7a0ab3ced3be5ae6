"""Give the regions of a prepared model their trainable state, and take the marks that carried it out of the graph.

A mark (`sptc::mark`, see sptc/paper/state.py) stands at the output of the module that holds a region's state, and has its tensors as
operands. It is matched to a region by that module's call (`nn_module_stack`, call suffix included) and, among several slots of one
module, by the name of the down weight (FFN) or by order (attention). A mark outside the checkpoint body that holds its region has its
tensors appended to the body's operands, so that the state is at hand where the region is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import fx, nn
from torch.fx import Node

from sptc.config import Config, ConfigError
from sptc.ir.region import AttentionRegion, CodebookState, FfnRegion, Refusal, Region, RouterState, State
from sptc.paper.state import MARK, Slot, parse_layout
from sptc.passes.graph.frame import Frame, frames, hand_down, input_index, outermost, parameter
from sptc.passes.graph.pattern import exchanged, shape
from sptc.passes.graph.site import parameter_path, site_of, unwrapped
from sptc.passes.unit import Unit

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Marked:
    """A slot of one mark."""

    mark: Node
    frame: Frame
    slot: Slot
    tensors: tuple[Node, ...]
    training: bool


def bind(unit: Unit) -> Unit:
    """Fill `states` for the regions that marks belong to, and erase the marks.

    A region whose owner carries no slot for it gets no entry. State that does not fit its region, and state without a region, are refusals
    of rule "state".

    Raises:
        ConfigError: an option that was given contradicts the prepared state.
    """
    every = list(frames(unit.gm))
    marks = [(frame, node) for frame in every for node in frame.gm.graph.find_nodes(op="call_function", target=MARK)]
    if not marks:
        return unit
    by_graph = {frame.gm.graph: frame for frame in every}
    states: dict[Region, State] = {}
    refusals: list[Refusal] = []
    refused: set[Region] = set()
    for frame, mark in marks:
        regions = [r for r in unit.regions if holder(r) == _owner(mark)]
        slots = _slots(frame, mark)
        pairs = _pair_ffn(slots, regions, by_graph) + _pair_attention(slots, regions)
        for marked, region in pairs:
            reason = _misfit(marked, region, by_graph[region.y.graph])
            if reason is None:
                _check_options(marked, region, unit.config)
                states[region] = _state(marked, by_graph[region.y.graph], unit.example_inputs)
            else:
                refusals.append(Refusal(region.kind, "state", region.y, reason, region.site))
                refused.add(region)
        paired = {region for _, region in pairs}
        for marked in (s for s in slots if all(s is not other for other, _ in pairs)):
            orphans = [r for r in regions if r.kind == marked.slot.kind and r not in paired]
            refusals += _without_region(marked, orphans, unit)
            refused.update(orphans)
    before = {mark: _before(mark) for _, mark in marks}
    for _, mark in marks:
        mark.replace_all_uses_with(before[mark])
        mark.graph.erase_node(mark)
    kept = {region: exchanged(region, before) for region in unit.regions if region not in refused}
    return replace(
        unit,
        regions=tuple(kept.values()),
        losses=exchanged(unit.losses, before),
        refusals=tuple(exchanged(r, before) for r in (*unit.refusals, *dict.fromkeys(refusals))),
        states={kept[region]: state for region, state in states.items()},
    )


def holder(region: Region) -> tuple[str, ...]:
    """The call of the module that holds a region's state: its owner, or what is around it where the owner is a container.

    A container calls or counts its submodules, so that `spt` must not become one of them.
    """
    keys = list(region.site.owner)
    stack = next((stack for node in region.nodes if keys and keys[-1] in (stack := node.meta.get("nn_module_stack") or {})), {})
    while keys and issubclass(stack[keys[-1]][1], _CONTAINERS):
        keys.pop()
    return tuple(keys)


def _owner(mark: Node) -> tuple[str, ...]:
    return tuple(mark.meta.get("nn_module_stack") or ())


def _before(mark: Node) -> Node:
    """What a mark marks; owners may nest, and so may their marks."""
    node = mark
    while node.target is MARK:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _slots(frame: Frame, mark: Node) -> list[_Marked]:
    _, tensors, layout, training = mark.args
    slots = parse_layout(str(layout))
    assert isinstance(tensors, Sequence) and len(tensors) == sum(slot.tensors for slot in slots), f"malformed mark {mark.format_node()}"
    left = iter(tensors)
    parts = [tuple(islice(left, slot.tensors)) for slot in slots]
    return [_Marked(mark, frame, slot, part, bool(training)) for slot, part in zip(slots, parts, strict=True)]  # type: ignore[arg-type]


def _pair_ffn(slots: list[_Marked], regions: list[Region], by_graph: Mapping[fx.Graph, Frame]) -> list[tuple[_Marked, Region]]:
    """Slots and FFN regions with the same down weight. The longest name chooses first: "other.fc2.weight" also ends in "fc2.weight"."""
    left = [r for r in regions if isinstance(r, FfnRegion)]
    named = sorted((s for s in slots if s.slot.kind == "ffn"), key=lambda s: -len(s.slot.down))
    paths = {r: parameter_path(outermost(parameter(r.down.weight), by_graph[r.y.graph])) for r in left}
    if len(named) == len(left) == 1 and not paths[left[0]]:
        return [(named[0], left[0])]  # names are unknown where DDP splits graphs; there is only one way to pair them
    pairs: list[tuple[_Marked, Region]] = []
    for marked in named:
        wanted = unwrapped(marked.slot.down.split("."))
        region = next((r for r in left if paths[r][-len(wanted) :] == wanted), None)
        if region is not None:
            pairs.append((marked, region))
            left.remove(region)
    return pairs


def _pair_attention(slots: list[_Marked], regions: list[Region]) -> list[tuple[_Marked, Region]]:
    """Slot i belongs to the i-th attention that the owner's call computes."""
    found = [r for r in regions if isinstance(r, AttentionRegion)]
    return [(s, found[s.slot.index]) for s in slots if s.slot.kind == "attention" and s.slot.index < len(found)]


def _misfit(marked: _Marked, region: Region, frame: Frame) -> str | None:
    """Why a slot's tensors can't serve a region; None when they can."""
    name, sizes = f"the prepared state {marked.slot.name!r}", list(shape(marked.tensors[0]))
    problem = ""
    if marked.frame not in frame.path():
        problem = f"{name} is used inside an activation checkpoint that does not hold its region"
    elif isinstance(region, FfnRegion):
        width = shape(region.x)[-1]
        if len(sizes) != 2 or sizes[1] != width:
            problem = f"{name} has a router of shape {sizes}, but the FFN's input has {width} features"
        elif region.hidden % sizes[0]:
            problem = f"{name} has {sizes[0]} blocks, which do not divide the FFN's hidden size {region.hidden}"
        elif shape(marked.tensors[-1])[0] != shape(region.y)[-1]:
            problem = f"{name} adds {shape(marked.tensors[-1])[0]} features to an FFN whose output has {shape(region.y)[-1]}"
    else:
        heads, width = shape(region.k)[-3], shape(region.k)[-1]
        if len(sizes) != 4 or sizes[0] != heads or sizes[1] * sizes[3] != width:
            problem = f"{name} has codebooks of shape {sizes}, but the attention has {heads} key heads of size {width}"
    return f"{problem}; prepare the model again" if problem else None


def _check_options(marked: _Marked, region: Region, config: Config) -> None:
    """The state's shapes win over defaults; an option that was given and says something else is a mistake."""
    where = region.site.module or "the model"
    if isinstance(region, FfnRegion):
        blocks = shape(marked.tensors[0])[0]
        if "ffn.blocks" in config.given and config.ffn_blocks != blocks:
            raise ConfigError(
                f"option 'ffn.blocks' is {config.ffn_blocks}, but the router of {where} was prepared for {blocks} blocks; "
                "leave the option out, or prepare a fresh model with it"
            )
    elif "attention.selector" in config.given and config.attention_selector != "pq":
        raise ConfigError(
            f"option 'attention.selector' is {config.attention_selector!r}, but {where} was prepared with codebooks, which only 'pq' uses; "
            "leave the option out, or prepare a fresh model with it"
        )


def _state(marked: _Marked, frame: Frame, example_inputs: Sequence[Any]) -> State:
    tensors = [hand_down(node, marked.frame, frame) for node in marked.tensors]
    if marked.slot.kind == "attention":
        codebooks, code_sums, code_counts = tensors
        return CodebookState(codebooks, code_sums, code_counts, marked.training)
    index = input_index(outermost(marked.tensors[0], marked.frame))
    trainable = index is None or example_inputs[index].requires_grad
    weight, bias, start_weight, start_bias, low, high, constant = tensors
    return RouterState(weight, bias, start_weight, start_bias, low, high, constant, marked.training, trainable)


def _without_region(marked: _Marked, regions: Sequence[Region], unit: Unit) -> list[Refusal]:
    """Refusals for a slot that no region takes: the owner's other regions of its kind, or the mark itself."""
    kind: Any = marked.slot.kind
    name = f"the prepared state {marked.slot.name!r}"
    if not (unit.config.ffn_enabled if kind == "ffn" else unit.config.attention_enabled):
        return []
    if regions:
        reason = f"{name} belongs to {marked.slot.down or 'an attention that was not found'}, not to this; prepare the model again"
        return [Refusal(kind, "state", r.y, reason, r.site) for r in regions]
    site = site_of([marked.mark])
    if any(r.kind == kind and r.site.owner[: len(site.owner)] == site.owner for r in unit.refusals):
        return []  # the finder has said why
    reason = (
        f"{name} reached a graph without its region: a graph break parts them, or its module is the one that torch.compile was called on, "
        "whose hooks Dynamo runs outside the graph; compile a module around it, or set torch._dynamo.config.wrap_top_frame = True"
    )
    return [Refusal(kind, "state", marked.mark, reason, site)]
