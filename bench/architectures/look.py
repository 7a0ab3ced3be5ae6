"""One architecture: what is found in it, what is refused and why, what nobody mentions, and whether it equals eager at density 1."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils import _pytree as pytree

from bench.architectures.build import tiny_batch, tiny_config
from bench.architectures.count import places, unmentioned
from sptc.backend import captured_unit, compile_graph
from sptc.config import Config
from sptc.model.capture import capture
from sptc.passes.find.regions import find
from sptc.passes.normalize.lower import lower
from sptc.passes.unit import Unit

DENSITY_ONE = {"decline": "never", "attention.density": 1.0, "ffn.density": 1.0, "attention.query_block": 4, "attention.key_block": 4}
TOLERANCE = 1e-5  # of a gradient, relative to max(largest of the parameter, 1e-2 of the model's largest)
NEAR = 1e-2  # eager in fp32 is taken for rounded fp64 up to this error
KINDS = ("attention", "ffn")

_aot = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward), decompositions=select_decomp_table)


@dataclass(frozen=True)
class Look:
    """What was seen of one architecture. Counts are by kind, over all its graphs."""

    name: str
    attention: str  # "sdpa" or "eager": the implementation that transformers was asked for
    graphs: int
    similar: dict[str, int]  # what looks like a region, by the yardstick
    found: dict[str, int]
    refused: dict[str, int]
    reasons: list[str]  # of refusals, each once
    unmentioned: list[str]
    density_one: str = ""  # "equal (error)", or what was seen instead; "" where it was not run


def build(name: str, attention: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model in train mode, without dropout, and its batch; the same ones every time."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(tiny_config(cls.config_class, attention)).train()
    return model, tiny_batch(model)


def look(name: str, attention: str) -> Look:
    """Capture, normalize and find; nothing is compiled."""
    model, batch = build(name, attention)
    units: list[tuple[Unit, list[Any]]] = []

    def judge(gm: fx.GraphModule, inputs: list[Any]) -> None:
        unit = lower(captured_unit(gm, inputs, Config()))
        units.append((find(unit), places(unit)) if not unit.closed else (unit, []))

    capture(model, batch, judge)
    missing = [place for unit, similar in units for place in unmentioned(unit, similar)]
    refusals = [r for unit, _ in units for r in unit.refusals]
    return Look(
        name,
        attention,
        len(units),
        _by_kind(place.kind for _, similar in units for place in similar),
        _by_kind(r.kind for unit, _ in units for r in unit.regions),
        _by_kind(r.kind for r in refusals),
        list(dict.fromkeys(f"{r.kind} [{r.rule}] {r.site.source}: {r.reason}" for r in _one_a_line(refusals))),
        [f"{place.kind} {place.source}" for place in missing],
    )


def _by_kind(kinds: Iterator[str]) -> dict[str, int]:
    return dict(Counter(kinds))


def _one_a_line(refusals: list[Any]) -> list[Any]:
    """The first refusal of each rule at each line: layers repeat it."""
    first: dict[Any, Any] = {}
    for r in refusals:
        first.setdefault((r.kind, r.rule, r.site.source), r)
    return list(first.values())


def density_one(name: str, attention: str) -> str:
    """Outputs and every gradient through all passes, with everything kept, in fp32, against fp64 eager: "equal", or what differs.

    A model that mixes dtypes by itself has no fp64 form, and one that chooses by its data may choose otherwise there: where eager in fp32
    is not near it, what equals eager in fp32 is equal too.
    """
    model, batch = build(name, attention)
    reference = copy.deepcopy(model).double()
    doubled = {key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in batch.items()}
    plain = _results(model, model, batch)
    try:
        want = _results(reference, reference, doubled)
    except RuntimeError:
        want = plain
    own = _error(plain, want)  # a tiny random model may be worse conditioned than a real one
    torch._dynamo.reset()
    got = _results(torch.compile(model, backend=_backend), model, batch)
    error = _error(got, want)
    if own > NEAR:
        error, own = min(error, _error(got, plain)), 0.0
    verdict = "equal" if error <= max(TOLERANCE, 2 * own) else "BAD"
    return f"{verdict} ({error:.0e}; eager {own:.0e})"


def _backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """All passes, then AOTAutograd with Inductor's decompositions, whose graphs run as they are: seconds instead of minutes."""
    return compile_graph(gm, example_inputs, Config.from_options(DENSITY_ONE), inner=lambda g, inputs, _: _aot(g, inputs))


def _results(call: Callable[..., Any], model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs, and the gradients of a sum in which each of their elements counts differently."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    outputs = [t for t in pytree.tree_leaves(tuple(call(**batch).values())) if isinstance(t, Tensor) and t.requires_grad]
    loss = sum((t.double() * torch.arange(t.numel(), dtype=torch.double).cos().view_as(t)).sum() for t in outputs)
    loss.backward()  # type: ignore[union-attr]
    results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return results | {key: p.grad for key, p in model.named_parameters() if p.grad is not None and p.numel()}


def _error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    if got.keys() != want.keys():
        return float("inf")
    largest = max(float(g.abs().max()) for key, g in want.items() if not key.startswith("output "))
    errors = [float((got[key].double() - g.double()).abs().max()) / max(float(g.abs().max()), 1e-2 * largest) for key, g in want.items()]
    return max((error if error == error else float("inf")) for error in errors)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the advice of transformers and the notices of sptc, of which a hundred models give many."""
    ours = logging.getLogger("sptc")
    theirs, level = transformers.logging.get_verbosity(), ours.level
    transformers.logging.set_verbosity_error()
    ours.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(theirs)
        ours.setLevel(level)
