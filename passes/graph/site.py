"""Where in the user's model a set of nodes comes from, and what people call a node."""

from __future__ import annotations

import operator
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from sptc.ir.region import Site
from sptc.passes.graph.pattern import op

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_ROOT = re.compile(r"^[LG]\['[^']*'\]\.?")
_ITEM = re.compile(r"\.?(?:__dict__\['_modules'\]|_modules)\['([^']*)'\]")
_STEP = re.compile(r"\['([^']*)'\]|\.(\w+)|\[(\d+)\]")
_TABLES = {"_modules", "_parameters", "_buffers", "__dict__"}
_WRAPPERS = {"base_layer"}  # PEFT puts the weight of a layer that it adapts under this name
_TORCH = os.path.dirname(torch.__file__) + os.sep


def site_of(nodes: Iterable[Node]) -> Site:
    """The deepest module common to `nodes`, and the source line of the last of them.

    Nodes without module metadata (constants that tracing added) are passed over. The source line is the innermost frame in the file
    that defines that module's class; failing that, the innermost frame outside torch; "" when the trace holds neither.
    """
    ordered = sorted(nodes)
    stacks = [stack for node in ordered if (stack := node.meta.get("nn_module_stack"))]
    owner = _common_prefix([list(stack) for stack in stacks])
    name, cls = stacks[0][owner[-1]] if owner else ("", None)
    trace = next((trace for node in reversed(ordered) if (trace := node.meta.get("stack_trace"))), "")
    return Site(_module_path(name), _source(trace, cls), tuple(owner))


def modules_of(nodes: Iterable[Node]) -> set[str]:
    """The paths of all modules that `nodes` were computed in, with those around them, called or not; the root has none."""
    names = {name for node in nodes for name, _ in (node.meta.get("nn_module_stack") or {}).values()}
    parts = [path.split(".") for name in names if (path := _module_path(name))]
    return {".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)}


def parameter_path(node: Node) -> list[str]:
    """The names on the way from the compiled frame to a parameter: ["layers", "0", "fc2", "weight"]; [] when unknown."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return []
    steps = [next(part for part in match.groups() if part is not None) for match in _STEP.finditer(source.name)]
    return unwrapped([s for s in steps[1:] if s not in _TABLES])  # the first is the local or global that holds the model


def called(node: Node) -> str:
    """A value by what its user knows: "mlp.down_proj.weight", "attention_mask", "silu of mlp.act_fn at activations.py:92".

    A parameter has its path, an input its name, a call its operator, module and source line. Paths begin behind the number of the layer,
    so that one cause reads the same in all layers. Where the graph knows no more it is the name of the node.
    """
    if node.op != "call_function":
        path = parameter_path(node)
        if path and not path[-1].isdigit():
            return _in_layer(path)
        source = getattr(node, "_dynamo_source", None)  # an argument, or an item of one
        steps = [] if source is None else [part for match in _STEP.finditer(source.name) for part in match.groups() if part is not None]
        return ".".join(steps) or node.name
    site = site_of([node])
    module = _in_layer(unwrapped(site.module.split(".")))
    if not module and not site.source:
        return node.name
    result = node
    while result.target is operator.getitem and isinstance(result.args[0], Node):
        result = result.args[0]
    word = op(result).split(".")[1] if op(result).count(".") > 1 else getattr(result.target, "__name__", str(result.target))
    return f"{word.strip('_')}{f' of {module}' if module else ''}{f' at {site.source}' if site.source else ''}"


def _in_layer(path: Sequence[str]) -> str:
    """A path behind its first number, if anything is there."""
    behind = next((i + 1 for i, name in enumerate(path) if name.isdigit()), 0)
    return ".".join(path[behind:] or path)


def unwrapped(names: list[str]) -> list[str]:
    """The names of a path without those that PEFT puts between a layer and its weight."""
    return [n for n in names if n not in _WRAPPERS]


def _common_prefix(stacks: Sequence[list[str]]) -> list[str]:
    prefix: list[str] = []
    for keys in zip(*stacks, strict=False):
        if any(key != keys[0] for key in keys):
            break
        prefix.append(keys[0])
    return prefix


def _module_path(name: str) -> str:
    """ "L['self']._modules['layers']._modules['0']" -> "layers.0"."""
    return _ITEM.sub(r".\1", _ROOT.sub("", name)).lstrip(".")


def _source(trace: str, cls: Any) -> str:
    frames = [(m["file"], m["line"]) for m in _FRAME.finditer(trace)]
    module = sys.modules.get(getattr(cls, "__module__", ""))
    home = getattr(module, "__file__", None)
    own = [frame for frame in frames if frame[0] == home] or [frame for frame in frames if not frame[0].startswith(_TORCH)]
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""
