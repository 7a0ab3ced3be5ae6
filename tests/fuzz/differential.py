"""Runs one program in eager mode, by AOTAutograd alone and by sptc, and says where sptc differs from both others.

The oracles differ where a program leaves it open, as a write by `.data` to what backward needs does: each value may be that of either.
"""

from __future__ import annotations

import copy
import linecache
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

import sptc
from sptc.backend import compile_graph
from sptc.config import Config
from tests.models.compiled import FULL

ROUNDING = ("float32", ".float()")  # of a program in float64
CALM = 1 / 3  # of the weights: then streams stay small
CALLS = 2  # the second one sees what the first one wrote


class Invalid(Exception):
    """A program that eager mode or AOTAutograd refuses."""


def load(source: str) -> type[nn.Module]:
    """The class `Model` of a source text, with lines that Dynamo and tracebacks can show."""
    name = f"<fuzz {zlib.crc32(source.encode()):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "fuzz"}
    exec(compile(source, name, "exec"), namespace)
    return namespace["Model"]  # type: ignore[no-any-return]


def observe(model: nn.Module, call: Callable[..., Any], dtype: torch.dtype, train: bool, input_grad: bool) -> dict[str, Tensor]:
    """What can be seen of CALLS calls of `call`, which runs `model`: outputs, gradients, and parameters, buffers and inputs afterwards."""
    seen: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(7)
    for step in range(CALLS):
        torch.manual_seed(step)
        leaf = torch.randn(2, 5, 8, generator=generator, dtype=dtype).requires_grad_(input_grad and train)
        mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
        x = leaf * 1
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            out = call(x, mask)
        outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if any(t.requires_grad for t in outputs):
            loss = sum((t * torch.arange(t.numel(), dtype=t.dtype).cos().view(t.shape)).sum() for t in outputs if t.requires_grad)
            loss.backward()  # type: ignore[union-attr]
        named = {f"output {i}": t for i, t in enumerate(outputs)}
        named |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        named |= {f"{n} after the call": t for n, t in (*model.named_parameters(), *model.named_buffers(), ("x", x), ("mask", mask))}
        if leaf.grad is not None:
            named["gradient of x"] = leaf.grad
        seen |= {f"call {step}: {name}": t.detach().clone() for name, t in named.items()}
    return seen


def differs(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> dict[str, str]:
    """Where two observations differ, and by how much."""
    wrong = {name: f"{'extra' if name in got else 'missing'}" for name in got.keys() ^ want.keys()}
    sizes = [float(t.abs().max()) for n, t in want.items() if "gradient" in n]
    floor = max(1e-2, 2 * tolerance) * max((s for s in sizes if math.isfinite(s)), default=1.0)
    for name in got.keys() & want.keys():
        actual, expected = got[name].double(), want[name].double()
        if (actual.shape, got[name].dtype) != (expected.shape, want[name].dtype):
            wrong[name] = f"{got[name].dtype} {list(actual.shape)} for {want[name].dtype} {list(expected.shape)}"
            continue
        finite = expected[expected.isfinite()]
        scale = max(float(finite.abs().max()) if finite.numel() else 0.0, floor if "gradient" in name else 1e-2)
        if not torch.allclose(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True):
            wrong[name] = f"off by {float((actual - expected).abs().max()) / scale:.2g} of its largest"
    return wrong


def _beyond_rounding(
    wrong: Mapping[str, str], ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> dict[str, str]:
    """What of `wrong` is larger than ten times what eager mode itself is off: streams without norms explode, bf16 rounds."""

    def off(name: str) -> bool:
        if any(name not in seen for seen in (ours, eager, exact)) or ours[name].shape != exact[name].shape:
            return True
        a, e, x = (seen[name].double() for seen in (ours, eager, exact))
        return not float((a - e).abs().max()) <= 10 * float((e - x).abs().max())

    return {name: how for name, how in wrong.items() if off(name)}


def difference(source: str, planted: Mapping[str, str], *, dtype: str, train: bool, input_grad: bool) -> tuple[str, sptc.Report]:
    """What is wrong with sptc on a program: a text that is empty if nothing is, and its report.

    Raises:
        Invalid: eager mode or AOTAutograd does not run the program either.
    """
    real = getattr(torch, dtype)
    # Reentrant checkpoints give eager mode no gradient where their input has none; graphs have one, and other checkpoints too.
    models = [load(text) for text in (source, source.replace("use_reentrant=True", "use_reentrant=False"))]
    for i, model_class in enumerate(models):
        torch.manual_seed(0)
        models[i] = model_class().to(real).train(train)

    def run(compiled_by: Any, real: torch.dtype = real, scale: float = 1.0) -> dict[str, Tensor]:
        torch._dynamo.reset()
        mine = copy.deepcopy(models[compiled_by is None]).to(real)
        with torch.no_grad():
            for parameter in mine.parameters():
                parameter.mul_(scale)
        call = mine if compiled_by is None else torch.compile(mine, backend=compiled_by)
        reports.append(call)
        return observe(mine, call, real, train, input_grad)

    warnings.simplefilter("ignore")  # of checkpoints without gradients, and of gradients of what is no leaf
    reports: list[Any] = []
    captured: set[str] = set()
    routed = zlib.crc32(source.encode()) % 2 == 1  # half of the programs, the same each time
    config = Config.from_options({**FULL, "ffn.selector": "router", "ffn.blocks": 4} if routed else FULL)

    def sptc_backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.update(_modules(gm))
        return compile_graph(gm, example_inputs, config, inner=lambda g, inputs, _: aot_eager(g, inputs))  # partitioned as Inductor does

    exact = dtype == "float64" and not any(word in source for word in ROUNDING)
    tolerance = 0.05 if "bfloat16" in source else 1e-9 if exact else 1e-4
    try:
        eager = run(None)
    except RuntimeError as error:
        raise Invalid(str(error)) from error
    try:
        ours = run(sptc_backend)
    except Exception as error:
        try:
            run("aot_eager")
        except Exception as theirs:
            raise Invalid(str(theirs)) from theirs
        cause = error.__cause__ if isinstance(error, TorchDynamoException) and error.__cause__ is not None else error
        return f"sptc raises {type(cause).__name__}: {str(cause)[:400]}", sptc.Report.of([])
    report = sptc.report(reports[-1]) if planted else sptc.Report.of([])  # graphs without a parameter are nobody's, so without a report
    wrong, found = differs(ours, eager, tolerance), ""
    if wrong:
        try:
            theirs = differs(ours, run("aot_eager"), tolerance)
        except RuntimeError:
            theirs = wrong
        if dtype == "float32":
            try:
                precise = run(None, torch.float64)
            except RuntimeError:  # such as finfo(x.dtype).min in a float32 tensor: then nothing is known of the rounding
                precise = {}
            wrong = _beyond_rounding(wrong, ours, eager, precise)
        if wrong:  # where nothing explodes, a softmax is not a choice that rounding makes, and what is wrong still is
            calm = differs(run(sptc_backend, scale=CALM), run(None, scale=CALM), tolerance)
            wrong = {name: how for name, how in wrong.items() if name in calm}
        found = "; ".join(
            f"{name}: {wrong[name]} from eager, {theirs[name]} from aot_eager" for name in sorted(wrong.keys() & theirs.keys())
        )
    if not found:
        found = unmentioned(report, planted, source, captured)
    return found, report


def unmentioned(report: sptc.Report, planted: Mapping[str, str], source: str, captured: set[str]) -> str:
    """Planted regions that are neither found nor refused; an operator in one that no pass looks into is a refusal too.

    Args:
        report: of the program.
        planted: kinds of regions by the names of their modules.
        source: of the program: a row may also be told by its line.
        captured: names of modules that graphs hold; what Dynamo leaves to Python is not for sptc to find.
    """
    if any(r.rule == "untraceable" for r in report.regions):
        return ""
    said = {(name, r.kind) for r in report.regions for name in (*r.module.split("."), _class_at(source, r.source))}
    missing = [f"{kind} {name}" for name, kind in planted.items() if name in captured and not {(name, kind), (name, "graph")} & said]
    return f"neither found nor refused: {', '.join(missing)}" if missing else ""


def _class_at(source: str, place: str) -> str:
    """The name of the module whose class holds a line, given as "file:line"."""
    line = place.rpartition(":")[2]
    above = source.splitlines()[: int(line)] if line.isdigit() else []
    return next((text[6:].partition("(")[0].lower() for text in reversed(above) if text.startswith("class ")), "")


def _modules(gm: fx.GraphModule) -> Iterator[str]:
    """Names, each without the path to it, of the modules that a captured graph and the bodies in it hold."""
    graphs = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    stacks = [node.meta.get("nn_module_stack", {}) for m in graphs for node in m.graph.nodes]
    paths = {entry[0] for stack in stacks for entry in stack.values()}
    return (name for path in paths for name in re.findall(r"\w+", path))
