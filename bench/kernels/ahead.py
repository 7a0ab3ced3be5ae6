"""Every template compiled ahead of time for named architectures, and whether what the result uses is within bounds."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from triton import CompilationError
from triton.runtime.errors import PTXASError

import sptc.codegen
from bench.kernels.cases import AttentionCase, attention_operands
from sptc.codegen.triton.launchers import attention, selection
from sptc.codegen.triton.launchers.mask import KernelMask
from sptc.codegen.triton.run.aot import Resources, compile_ahead, resources
from sptc.codegen.triton.run.launch import Launch, recorded
from sptc.codegen.triton.run.load import load
from sptc.codegen.triton.target import Target, targeting

META = torch.device("meta")
# A warpgroup multiplies 64 rows or more. These have fewer: the 16 codewords of a sub-space, and the mean queries of one tile.
FEW_ROWS = frozenset({"code_statistics", "pooled_logsumexp"})


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one target. `broken` says which bounds it breaks."""

    template: str
    case: str
    target: str
    used: Resources | None  # None if it does not compile
    broken: tuple[str, ...]


def templates() -> set[str]:
    """The templates: files of `codegen/triton/templates` with a kernel of their name."""
    folder = Path(next(iter(sptc.codegen.__path__)), "triton", "templates")
    return {path.stem for path in folder.rglob("*.py") if path.stem in _functions(path)}


def launches(case: AttentionCase, target: Target, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What training with the case launches on `target`, each kernel once."""
    with targeting(target), recorded() as found:
        _attention(case, dtype)
    return list({launch.spec: launch for launch in found}.values())


def compiled(cases: Sequence[AttentionCase], targets: Sequence[Target], only: Sequence[str] = ()) -> Iterator[Row]:
    """Compile every kernel of the cases (of the templates `only`, if given) for every target, each distinct one once."""
    for target in targets:
        done = set()
        for case in cases:
            for launch in launches(case, target):
                if launch.spec not in done and (not only or launch.spec.template in only):
                    done.add(launch.spec)
                    yield row(launch, case.name, target)


def row(launch: Launch, case: str, target: Target) -> Row:
    """Compile one kernel. That it does not compile is a row, too: the others still have to be seen."""
    try:
        used = resources(compile_ahead(launch, target))
    except (CompilationError, PTXASError, RuntimeError) as error:  # Triton's own passes raise RuntimeError
        reason = str(error.__cause__ or error).strip().splitlines()[-1:]
        return Row(launch.spec.template, case, target.name, None, (f"does not compile: {type(error).__name__} {''.join(reason)}",))
    return Row(launch.spec.template, case, target.name, used, broken_bounds(launch, used, target))


def broken_bounds(launch: Launch, used: Resources, target: Target) -> tuple[str, ...]:
    """What must not be: values that do not fit in registers, more shared memory than there is, a product off the fastest matrix units."""
    found = []
    if used.spilled:
        found.append(f"spills {used.spilled} bytes")
    if used.shared_memory > target.shared_memory:
        found.append(f"{used.shared_memory} bytes of shared memory, {target.shared_memory} are there")
    if not used.matrix_instructions and "tl.dot(" in load(launch.spec).source:
        found.append("no matrix instruction")
    slow = used.matrix_instructions - used.warpgroup_instructions
    if slow and target.warpgroups and launch.spec.template not in FEW_ROWS:
        found.append(f"{slow} of {used.matrix_instructions} matrix instructions are mma.sync, those of one warp")
    return tuple(found)


def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def _attention(case: AttentionCase, dtype: torch.dtype) -> None:
    o = attention_operands(case, META, dtype)
    mask = KernelMask(*o.mask, (case.batch, case.heads, case.length, case.length))
    numbers = (case.density, case.scale, case.query_block, case.key_block, case.own, o.codebooks is not None)
    ids, counts, *_ = selection.select_blocks(o.q, o.k, o.codebooks, mask, case.selector, *numbers)
    rest = (ids, counts, *o.mask, o.seed, case.dropout, case.scale, case.query_block, case.key_block, case.transform)
    out, lse = attention.forward(o.q, o.k, o.v, *rest)
    attention.backward(o.grad, o.q, o.k, o.v, out, lse, *rest, [True] * 3)
