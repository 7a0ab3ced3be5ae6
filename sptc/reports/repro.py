"""A captured graph as a Python script that runs it eager, under Inductor and under backend "spt", and compares. For bug reports.

No value of the user's is in it: weights and inputs are drawn anew, of the same shapes, strides, dtypes, means and deviations; integers from
the same range. What can't be written down as text (a function that is not importable) makes a script that says so.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pprint
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.fx.graph import _custom_builtins
from torch.utils.checkpoint import checkpoint

from sptc.ir.hint import optimization_hint
from sptc.passes.graph.pattern import CHECKPOINT
from sptc.reports import repro_main

_SAMPLED = 65536  # values of a tensor whose mean and deviation are taken
_USUAL = (0.0, 0.02)  # mean and deviation of what has no values


class Unwritable(ValueError):
    """Something in a graph has no text."""


def repro(gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> str:
    """The script of a graph as Dynamo captured it, with its inputs and the options of backend "spt"."""
    try:
        classes, imports = _classes(gm, "Graph")
        arguments = [_argument(node.name, value) for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)]
    except Unwritable as error:
        return f'"""This graph can\'t be written down as a script: {error}"""\n\nraise SystemExit(__doc__)\n'
    kept = {key: value for key, value in options.items() if key != "dump"}
    return "\n".join(
        [
            '"""A graph that torch.compile captured, run eager, under Inductor and under backend "spt". All values are random."""\n',
            *sorted({*_imports_of(repro_main), *imports}),
            "",
            "",
            *classes,
            "def inputs():",
            "    return [",
            *arguments,
            "    ]",
            "",
            "",
            f"OPTIONS = {pprint.pformat(kept, width=120)}",
            f"AUTOCAST = {_autocast(inputs)!r}  # device and dtype, as where the graph was captured",
            "",
            "",
            *(inspect.getsource(value) for value in vars(repro_main).values() if inspect.isfunction(value)),
            'if __name__ == "__main__":',
            "    main(Graph(), inputs(), OPTIONS, AUTOCAST)",
            "",
        ]
    )


def _imports_of(module: types.ModuleType) -> Iterator[str]:
    lines = inspect.getsource(module).splitlines()
    return (line for line in lines if line.startswith(("import ", "from ")) and "__future__" not in line)


def _classes(gm: fx.GraphModule, name: str) -> tuple[list[str], set[str]]:
    """Text of the graph and of the graphs inside it, innermost first, and the imports that they need."""
    graph = copy.deepcopy(gm.graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is CHECKPOINT:
            node.target = checkpoint  # what the user wrote: the operator wants graphs, not modules
    code = graph.python_code("self")
    imports = {_import(alias, value) for alias, value in code.globals.items()}
    texts, attributes = [], []
    for target in dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")):
        if "." in target:
            raise Unwritable(f"it reads {target}")
        value = getattr(gm, target)
        if isinstance(value, fx.GraphModule):
            inner, more = _classes(value, f"{name}_{target}")
            texts += inner
            imports |= more
            attributes.append(f"        self.{target} = {name}_{target}()")
        else:
            attributes.append(f"        self.{target} = {_value(target, value)}")
    if list(graph.find_nodes(op="call_module")):
        raise Unwritable("it calls modules of the user")
    forward = "\n".join("    " + line if line.strip() else "" for line in code.src.strip().splitlines())
    init = ["    def __init__(self):", "        super().__init__()", *attributes, ""] if attributes else []
    return [*texts, f"class {name}(torch.nn.Module):", *init, forward, "", ""], imports


def _import(alias: str, value: Any) -> str:
    if alias in _custom_builtins:
        return _custom_builtins[alias].import_str
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__}" + ("" if alias == value.__name__ else f" as {alias}")
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module is None or "." in name or getattr(importlib.import_module(module), name, None) is not value or module == "__main__":
        raise Unwritable(f"it uses {alias}, which can't be imported")
    return f"from {module} import {name} as {alias}"


def _argument(name: str, value: Any) -> str:
    return f"        {_value(name, value)},  # {name}"


def _value(name: str, value: Any) -> str:
    """An expression that makes something like `value`, by functions of `repro_main`."""
    if isinstance(value, torch.SymInt):
        return str(optimization_hint(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise Unwritable(f"{name} is a {type(value).__name__}")
    shape, stride = (tuple(map(optimization_hint, sizes)) for sizes in (value.shape, value.stride()))
    place = f"{shape}, {stride}, {value.dtype}, {str(value.device)!r}"
    if value.is_complex():
        raise Unwritable(f"{name} is complex")
    if value.is_floating_point():
        mean, deviation = _moments(value)
        return f"floats({place}, {mean:.3g}, {deviation:.3g}, {value.requires_grad}, {isinstance(value, nn.Parameter)})"
    low, high, share = _range(value)
    return f"integers({place}, {low}, {high}, {share:.3g})"


def _moments(value: Tensor) -> tuple[float, float]:
    """Mean and deviation; of what is not finite, or has no values, usual ones."""
    if isinstance(value, FakeTensor) or value.numel() == 0:
        return _USUAL
    wide = _sample(value.detach()).double()
    mean, deviation = float(wide.mean()), float(wide.std(correction=0))
    return (mean, deviation) if math.isfinite(deviation) and abs(mean) < 1e4 else _USUAL


def _sample(value: Tensor) -> Tensor:
    """A view of at most 65,536 values, evenly spaced: of a table of embeddings, all in a wider dtype would be gigabytes."""
    most = int(_SAMPLED ** (1 / max(1, sum(size > 1 for size in value.shape))))
    return value[tuple(slice(None, None, -(-size // most) | 1) for size in value.shape)]  # odd: weights lie in patterns of even lengths


def _range(value: Tensor) -> tuple[int, int, float]:
    """Least and greatest, and the share that is the least where that stands for none (a negative label, False)."""
    if isinstance(value, FakeTensor) or value.numel() == 0:
        return 0, 0, 0.0
    whole = value.detach().long()
    low, high = int(whole.min()), int(whole.max())
    alone = low < 0 or value.dtype == torch.bool
    return low, high, float((whole == low).double().mean()) if alone else 0.0


def _autocast(inputs: Sequence[Any]) -> tuple[str, str] | None:
    device = next((value.device.type for value in inputs if isinstance(value, Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return None
    return device, str(torch.get_autocast_dtype(device)).removeprefix("torch.")
