"""Correctness on a device: every output and gradient against the fp64 reference, beside what plain torch in the same dtype gets wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.kernels import steps
from bench.kernels.cases import AttentionCase, AttentionOperands, attention_operands
from sptc.codegen.reference import attention as attention_reference
from sptc.codegen.reference.block_lists import block_count, owned

_MULTIPLE = 2.0  # of the error of plain torch
_ROUNDING = 1e-6  # of the largest value, for errors of plain torch that happen to be none
_CODED_LISTS = 0.01  # share of list entries that may differ with "pq", whose scores are counts: ties that a nearer codeword decides
_SWAPPED = 2.0  # both blocks of a swap may move by the most that rounding the means moves any block of the tile
_SUMS = 1e-4  # of a tile's largest score, for what is left to the order of sums in fp32
_STATISTICS = 0.01  # of the largest value

CASES = (
    AttentionCase("LLaMA's heads", 1, 2048, 8, 2, 128, "causal"),
    AttentionCase("causal GQA", 2, 501, 4, 2, 64, "causal", density=0.25, selector="pq"),
    AttentionCase("causal dropout", 1, 500, 2, 2, 128, "causal", density=0.25, dropout=0.1),
    AttentionCase("padding", 3, 333, 4, 4, 80, "padding", density=0.5, dropout=0.1, selector="pq"),
    AttentionCase("padding, pooled", 3, 333, 4, 4, 64, "padding", density=0.5),
    AttentionCase("all, small blocks", 2, 257, 2, 1, 96, "none", density=0.25, query_block=16, key_block=16),
    AttentionCase("wide heads", 1, 300, 2, 1, 256, "causal", density=0.5, selector="pq"),
)


@dataclass(frozen=True)
class Check:
    """One tensor of one case: its largest error, and what it may be."""

    case: str
    tensor: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # a NaN fails


def check(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Selection, then attention on the lists of the reference, forward and backward, on `device`."""
    return list(_check(case, device, dtype))


def _check(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    o = attention_operands(case, device, dtype)
    exact = _attention_in(o, torch.device("cpu"), torch.float64)
    statistics = o.codebooks is not None
    numbers = (case.density, case.scale, case.query_block, case.key_block, case.own, statistics)
    wanted = attention_reference.select_blocks(
        exact.q, exact.k, exact.codebooks, attention_reference.Mask(*exact.mask), case.selector, *numbers
    )
    got = [x.cpu() for x in steps.select(case, o)]
    yield check_lists(case, exact, dtype, got[:2], wanted[:2])
    for name, value, want in zip(("code_sums", "code_counts"), got[2:], wanted[2:], strict=True):
        if want.numel():
            yield Check(case.name, name, _error(value, want), _STATISTICS * want.abs().max().item())

    lists = [x.to(device) for x in wanted[:2]]
    for x in (o.q, o.k, o.v):
        x.requires_grad_()
    out, lse = steps.attend(case, o, *lists)
    grads = torch.autograd.grad(out, (o.q, o.k, o.v), o.grad)
    results = [_attention_reference(case, o, exact.q.device, torch.float64, wanted), _attention_reference(case, o, device, dtype, lists)]
    yield Check(case.name, "lse", _error(lse, results[0][1]), 1e-3)
    for name, value, want, plain in zip(("out", "q", "k", "v"), (out, *grads), *_tensors(results, (0, 2, 3, 4)), strict=True):
        yield _within(case.name, name, value, want, plain)


def check_lists(
    case: AttentionCase, exact: AttentionOperands, dtype: torch.dtype, got: Sequence[Tensor], wanted: Sequence[Tensor]
) -> Check:
    """ids and counts against those of the reference.

    Kernels keep the mean queries of the selector "pooled" in `dtype`, which lets blocks of almost equal score change places. So lists are
    judged by the reference's own scores of the blocks that were swapped: the error is the most that a tile loses by a swap, as a share of
    what rounding explains there. An owned block left out, a forbidden one listed, another number of blocks or order is infinitely wrong.
    """
    blocks = block_count(case.length, case.key_block)
    kept, want = _kept(*got, blocks), _kept(*wanted, blocks)
    if case.selector == "pq":
        return Check(case.name, "lists", (kept != want).sum().item() / max(1, int(wanted[1].sum())), _CODED_LISTS)
    ids, counts = got
    pairs = torch.arange(1, ids.shape[-1]) < counts.unsqueeze(-1)
    if not torch.equal(kept.sum(-1), want.sum(-1)) or (pairs & (ids[..., 1:] <= ids[..., :-1])).any():
        return Check(case.name, "lists", float("inf"), 1.0)
    sizes = case.query_block, case.key_block
    shape = (case.batch, case.heads, case.length, case.length)
    allowed, visible = attention_reference.choosable(attention_reference.Mask(*exact.mask), shape, case.kv_heads, *sizes, exact.q.device)
    means = attention_reference.pooled_means(exact.q, case.query_block)
    scores, rounded = (
        attention_reference.pooled_scores(x, exact.k, allowed, visible, case.scale, *sizes) for x in (means, means.to(dtype).double())
    )
    explained = _SWAPPED * (scores - rounded).abs().amax(-1) + _SUMS * scores.amax(-1)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if case.own:
        scores = scores.masked_fill(owned(case.length, case.length, *sizes, exact.q.device) & allowed, torch.inf)
    out = scores.masked_fill(~(want & ~kept), -torch.inf).amax(-1)
    put = scores.masked_fill(~(kept & ~want), torch.inf).amin(-1)
    loss = (out - put).masked_fill((want == kept).all(-1), 0.0)
    return Check(case.name, "lists", (loss / explained).max().item(), 1.0)


def check_products(device: torch.device, dtype: torch.dtype) -> list[Check]:
    """The products of a routed FFN's list entries with the weights of their blocks, on `device`."""
    n, blocks, width, features = 203, 8, 48, 64
    ops, generator = torch.ops.sptc, torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x, h, weight, scores = draw(n, features), draw(n * 3, width), draw(blocks, width, features), draw(n, blocks).float()

    def run(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        a, b, w = (t.to(device, dtype) for t in (x, h, weight))
        tokens, _, offsets = ops.route(scores.to(device), 3)
        return [
            ops.gather_product(a, w, tokens, offsets),
            ops.scatter_product(b, w, tokens, offsets, n),
            ops.outer_product(b, a, tokens, offsets),
        ]

    cpu, names = torch.device("cpu"), ("gathered", "scattered", "outer")
    return [
        _within("products of blocks", *row) for row in zip(names, run(device, dtype), run(cpu, torch.float64), run(cpu, dtype), strict=True)
    ]


def _kept(ids: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """bool [..., tiles, blocks]."""
    live = torch.arange(ids.shape[-1]) < counts.unsqueeze(-1)
    kept = torch.zeros((*ids.shape[:-1], blocks), dtype=torch.int32)
    return kept.scatter_add_(-1, ids.long(), live.int()) > 0


def _attention_in(o: AttentionOperands, device: torch.device, dtype: torch.dtype) -> AttentionOperands:
    predicate, tensors, sizes, _, _ = o.mask
    mask = (predicate, [t.to(device) for t in tensors], sizes, None, None)
    q, k, v, grad = (x.detach().to(device, dtype) for x in (o.q, o.k, o.v, o.grad))
    return replace(
        o, q=q, k=k, v=v, grad=grad, mask=mask, codebooks=_moved(o.codebooks, device, torch.float32), seed=_moved(o.seed, device, dtype)
    )


def _attention_reference(
    case: AttentionCase, o: AttentionOperands, device: torch.device, dtype: torch.dtype, lists: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    moved = _attention_in(o, device, dtype)
    leaves = [x.requires_grad_() for x in (moved.q, moved.k, moved.v)]
    mask = attention_reference.Mask(*moved.mask)
    numbers = (moved.seed, case.dropout, case.scale, case.query_block, case.key_block, case.transform)
    out, lse = attention_reference.sparse_attention(*leaves, lists[0], lists[1], mask, *numbers)
    return out, lse, *torch.autograd.grad(out, leaves, moved.grad)


def _moved(x, device: torch.device, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """A tensor elsewhere, a floating one in `dtype`, as a leaf of its own; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    moved = x.detach().to(device, dtype) if x.is_floating_point() else x.to(device)
    return moved.clone(memory_format=torch.preserve_format) if moved.data_ptr() == x.data_ptr() else moved


def _tensors(results: Sequence[Sequence[Tensor]], which: Sequence[int]) -> list[list[Tensor]]:
    return [[result[i] for i in which] for result in results]


def _within(case: str, name: str, value: Tensor, want: Tensor, plain: Tensor) -> Check:
    bound = _MULTIPLE * _error(plain, want) + _ROUNDING * want.abs().max().item()
    return Check(case, name, _error(value, want), bound)


def _error(value: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where one of them is no number, or is infinite and the other is not."""
    value, want = (x.detach().to("cpu", torch.float64) for x in (value, want))
    return (value - want).masked_fill_(value == want, 0.0).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()
