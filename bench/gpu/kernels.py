"""Device time of each kernel of one forward and backward alone, beside the least that its operations and bytes take on this device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.journal import Figures, Journal
from bench.gpu.sizes import Sizes
from bench.gpu.stage import Limit
from bench.gpu.timing import one
from bench.kernels.cases import AttentionCase
from bench.kernels.tuning import step
from sptc.codegen.reference.block_lists import block_count, query_run
from sptc.codegen.triton.run.launch import Launch, recorded
from sptc.codegen.triton.run.load import load
from sptc.codegen.triton.spec import KernelSpec

_PRODUCTS = {"attention_forward": 2, "attention_backward_q": 3, "attention_backward_kv": 4}  # for each listed (query, key)


def kernels(case: AttentionCase, sizes: Sizes, journal: Journal, limit: Limit) -> Iterator[Figures]:
    """A row for each kernel, in the order of launches, then one for all of the step with the torch operators between them.

    `floor_share` is the floor over the time; `mm_share` the time that `torch.mm` takes for as many operations, at its best, over the time.
    """
    with torch.no_grad():
        whole = step(case, sizes.device, sizes.dtype)
        with recorded(run=True) as launches:
            whole()
        product, copy = journal.figure("product_rate"), journal.figure("copy_rate")
        entries = _listed(launches)
        total = 0.0
        for launch in launches:
            limit.check()
            if 0 in launch.grid:
                continue
            kernel = load(launch.spec, interpret=sizes.dry)
            run = functools.partial(kernel.launch, launch.grid, launch.arguments, sizes.device)
            ms = one(run, sizes, limit).ms
            total += ms
            operations = products(launch.spec, case, entries)
            moved = bytes_moved(launch)
            floor = 1e3 * max(operations / product, moved / copy) if product and copy else math.nan
            yield {
                "kernel": launch.spec.template,
                "ms": ms,
                "floor_ms": floor,
                "floor_share": floor / ms,
                "mm_share": 1e3 * operations / product / ms if product and operations else None,
                "operations": operations,
                "bytes": moved,
                "programs": math.prod(launch.grid),
                "warps": launch.spec.num_warps,
                "stages": launch.spec.num_stages,
            }
        timing = one(whole, sizes, limit)
        yield {
            "kernel": "all of it",
            "ms": timing.ms,
            "kernels_ms": total,
            "launches": len(launches),
            "host_ms": timing.host_ms,
            "peak_mib": timing.peak_mib,
        }


def _listed(launches: list[Launch]) -> int:
    """How many (tile, block) pairs the lists hold."""
    counts = next(launch.arguments["counts_ptr"] for launch in launches if launch.spec.template == "choose_blocks")
    assert isinstance(counts, Tensor)
    return int(counts.sum())


def products(spec: KernelSpec, case: AttentionCase, entries: int) -> int:
    """Operations of a kernel's matrix products: the `entries` blocks of the lists whole, as kernels compute them, and of pooled scores what
    the mask leaves."""
    if spec.template in _PRODUCTS:
        pairs = entries * case.query_block * case.key_block * (case.heads // case.kv_heads)
        return 2 * case.size * pairs * _PRODUCTS[spec.template]
    if spec.template.startswith("pooled_"):
        runs = case.batch * case.heads * block_count(case.length, query_run(case.query_block))
        return 2 * case.size * runs * case.length // (2 if case.own else 1)
    return 0


def bytes_moved(launch: Launch) -> int:
    """The least: each tensor read or written once."""
    tensors = {(x.data_ptr(), tuple(x.shape), x.stride()): x for x in launch.arguments.values() if isinstance(x, Tensor)}
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors.values())
