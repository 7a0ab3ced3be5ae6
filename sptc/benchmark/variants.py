"""What is compared: dense ways to run a step that any user has, and backend "spt" with options."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sptc.config import Config
from sptc.ir.errors import SptcError
from sptc.ir.plan import Plan

Backend = Literal["eager", "inductor", "spt"]
Precision = Literal["highest", "high", "medium"]

# Tokens that nothing reads are computed as well: what is faster then is so by its products alone.
DENSITY_ONE = {"decline": "never", "attention.density": 1.0, "ffn.density": 1.0, "ffn.context_density": None, "ffn.padding": "compute"}
KINDS = ("attention", "ffn", "loss")
_ROUNDING = 1e-5  # relative: what products in fp32 stay within, and products of operands cut to 16 bits do not


class BenchError(SptcError, ValueError):
    """A benchmark that can't begin: what is wrong, and what to write instead."""


@dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    name: str
    backend: Backend
    options: Mapping[str, Any] = field(default_factory=dict)  # of torch.compile
    mode: str | None = None  # of torch.compile
    precision: Precision = "highest"  # torch.set_float32_matmul_precision, torch's own default
    density_one: bool = False
    keeps_little: bool = False  # by the settings of AOTAutograd's partitioner that objective "memory" has, for Inductor as well
    prepares: bool = False  # by `sptc.prepare` on the batch, with these options, before anything is compiled

    @property
    def dense(self) -> bool:
        return self.backend != "spt"

    @property
    def compiles(self) -> bool:
        return self.backend != "eager"

    @property
    def exact(self) -> bool:
        """Whether it computes what the dense model does, and is held to it."""
        return self.dense or self.density_one


def default_variants(device: torch.device, dtype: str, plan: str | os.PathLike[str] | Plan | None = None) -> list[Variant]:
    """Eager, Inductor, Inductor at its best on `device`, "spt" at density 1, with its defaults, and with a plan.

    What a user can switch for dense models is switched for sparse ones as well, so that a ratio to the best dense variant is of sparsity.

    Raises:
        ConfigError: the plan can't be read.
    """
    products = fast_products(device, dtype)
    variants = [Variant("eager", "eager"), Variant("inductor", "inductor")]
    if device.type == "cuda":
        variants.append(Variant("inductor-best", "inductor", mode="max-autotune-no-cudagraphs", precision=products))
    elif products != "highest":
        variants.append(Variant("inductor-best", "inductor", precision=products))
    variants += [
        Variant("spt-density-1", "spt", DENSITY_ONE, precision=products, density_one=True),
        Variant("spt", "spt", precision=products),
    ]
    planned = {} if plan is None else {"spt-plan": {"plan": plan}}
    return [*variants, *own_variants("spt", planned, products)]


def kind_variants(precision: Precision) -> list[Variant]:
    """ "spt" with regions of one kind alone: beside each stands what the cost model says that it gains."""
    alone = {kind: {f"{other}.enabled": False for other in KINDS if other != kind} for kind in KINDS}
    return [Variant(f"spt-{kind}", "spt", options, precision=precision) for kind, options in alone.items()]


def fast_products(device: torch.device, dtype: str) -> Precision:
    """The `torch.set_float32_matmul_precision` that makes fp32 products fastest and that a user can be advised to take.

    On a GPU that is TF32. On a CPU "medium" hands fp32 products to oneDNN instead of MKL, which is faster on AMD processors. oneDNN may
    then cut operands to bf16, where the processor has instructions that pay for it: a product tells whether it does.
    """
    if device.type == "cuda":
        return "high"
    if dtype == "bf16":
        return "highest"  # products are in bf16 already
    before, numbers = torch.get_float32_matmul_precision(), torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=numbers) for _ in range(2))
    torch.set_float32_matmul_precision("medium")
    try:
        error = float((a @ b - (a.double() @ b.double())).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if error <= _ROUNDING * 256**0.5 else "highest"


def parse_options(text: str, backend: Backend) -> tuple[str, dict[str, Any]]:
    """Name and options of 'NAME={"ffn.density": 0.5}'.

    Raises:
        BenchError: no name, or no JSON object.
    """
    name, equals, written = text.partition("=")
    name = name.strip()
    example = "NAME='{\"ffn.density\": 0.5}'" if backend == "spt" else "NAME='{\"epilogue_fusion\": false}'"
    if not equals or not name:
        raise BenchError(f"variant {text!r} has no name: write {example}")
    try:
        options = json.loads(written)
    except ValueError as error:
        raise BenchError(f"variant {name!r}: {written!r} is no JSON ({error}); write {example}") from error
    if not isinstance(options, dict):
        raise BenchError(f"variant {name!r}: options are a JSON object, not {written!r}; write {example}")
    return name, options


def own_variants(backend: Backend, named: Mapping[str, Mapping[str, Any]] | None, precision: Precision) -> list[Variant]:
    """Variants of the user's own. Options of "inductor" are those of `torch.compile(model, options=...)`.

    Raises:
        ConfigError: an option of "spt" that there is not, or that can't be; a plan that can't be read.
        BenchError: an option that Inductor does not have.
    """
    variants = []
    for name, options in (named or {}).items():
        if backend == "spt":
            plan = Config.from_options(options).plan
            if plan is not None:
                Plan.load(plan)
                options = {**options, "plan": plan}  # as plain data, for a table of results
        else:
            _check_inductor(name, options)
        variants.append(Variant(name, backend, options, precision=precision))
    return variants


def _check_inductor(name: str, options: Mapping[str, Any]) -> None:
    known = torch._inductor.list_options()
    for key in options:
        if key.replace("-", "_") not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise BenchError(f"variant {name!r}: Inductor has no option {key!r}; did you mean {near!r}?")


def chosen(variants: Sequence[Variant], only: Iterable[str] | None) -> list[Variant]:
    """The variants that are called for, each once and in their order; all of them without `only`.

    Raises:
        BenchError: two of one name, a name that none has, or nothing to compare with.
    """
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BenchError(f"two variants are called {twice!r}")
    wanted = set(names if only is None else only)
    for name in sorted(wanted - set(names)):
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise BenchError(f"no variant {name!r}; did you mean {near!r}? There are {', '.join(names)}")
    taken = [variant for variant in variants if variant.name in wanted]
    if not any(variant.dense for variant in taken):
        raise BenchError("no dense variant to compare with: add inductor or eager")
    return taken
