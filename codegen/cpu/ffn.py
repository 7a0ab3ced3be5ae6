"""The routed FFN on a CPU: one block of hidden units at a time, from gathered tokens to their sum, so that a block stays in the cache.

Products read the weights where they lie; the activation is computed in fp32 (fp64 for fp64 inputs), in one pass that scales by the
router's score too. There is no loop over tokens.
Threads share the work by tokens: each takes a range of them through all blocks, so that no two add to the same row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sptc.codegen.cpu.activation import compile_activation
from sptc.codegen.cpu.parallel import share, worker_count
from sptc.codegen.cpu.products import Term, add_rows, multiply
from sptc.codegen.ffn_need import Need
from sptc.codegen.random import keep_runs
from sptc.codegen.routing import chosen_pairs


def route(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See `sptc.codegen.reference.ffn.route`."""
    blocks = scores.shape[1]
    pairs = chosen_pairs(scores, active, keep)
    block, token = pairs.nonzero().unbind(1)
    offsets = torch.zeros(blocks + 1, dtype=torch.int32)
    torch.cumsum(pairs.sum(1), 0, out=offsets[1:])
    return token.to(torch.int32), offsets, token * blocks + block


@dataclass(frozen=True)
class _Block:
    """One block of hidden units and the list entries that use it."""

    entries: slice  # of the list
    units: slice  # of the hidden units
    tokens: Tensor  # int32 [n]


@dataclass(frozen=True)
class _Range:
    """The list entries of a range of tokens: `bounds[g]` are the first of block g and the one after its last."""

    index: int
    bounds: list[tuple[int, int]]

    def blocks(self, tokens: Tensor, hidden: int) -> Iterator[_Block]:
        """Blocks with at least one token."""
        width = hidden // len(self.bounds)
        for g, (start, end) in enumerate(self.bounds):
            if end > start:
                yield _Block(slice(start, end), slice(g * width, (g + 1) * width), tokens[start:end])

    def scratch(self, width: int, dtype: torch.dtype) -> Tensor:
        """Memory for the hidden units of any one block: its pages are met once, not once a block."""
        return torch.empty((max(end - start for start, end in self.bounds), width), dtype=dtype)


def _ranges(tokens: Tensor, offsets: Tensor, count: int) -> list[_Range]:
    """As many ranges of the `count` tokens as there are threads; one if the tokens of a block are not in ascending order."""
    starts, ends = offsets[:-1].long(), offsets[1:].long()
    used = tokens[: int(offsets[-1])]
    falls = used[1:] < used[:-1]
    falls[(starts[(starts > 0) & (starts < len(used))]) - 1] = False
    parts = 1 if len(used) < 2 or bool(falls.any()) else min(worker_count(), max(1, count))
    cuts = [starts]
    for i in range(1, parts):
        below = torch.zeros(len(used) + 1, dtype=torch.int64)
        torch.cumsum(used < i * count // parts, 0, out=below[1:])
        cuts.append(starts + below[ends] - below[starts])
    cuts.append(ends)
    return [_Range(i, list(zip(a.tolist(), b.tolist(), strict=True))) for i, (a, b) in enumerate(itertools.pairwise(cuts))]


@dataclass(frozen=True)
class _Dropout:
    """Inverted dropout of hidden units; the fate of a unit depends on the seed, its token and itself only."""

    seed: Tensor | None
    p: float
    hidden: int

    def keep(self, block: _Block) -> Tensor | None:
        """bool [n, width]: the units of `block` that survive; None where nothing is dropped."""
        if self.p == 0.0:
            return None
        if self.seed is None:
            raise ValueError(f"sptc::routed_ffn needs a seed for dropout with p={self.p}")
        start = block.tokens.to(torch.int64) * self.hidden + block.units.start
        return keep_runs(self.seed, start, block.units.stop - block.units.start, self.p)

    def apply(self, a: Tensor, keep: Tensor | None) -> Tensor:
        """`a` [n, width] with dropped units at 0 and the others scaled; `a` itself if `keep` is None."""
        return a if keep is None else torch.where(keep, a * (1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0), 0.0)


def routed_ffn(
    x: Tensor,
    up: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    biased: Sequence[int],
    low: Sequence[Tensor],
    up_B: Sequence[Tensor],
    adapted: Sequence[int],
    down: Tensor,
    down_A: Tensor | None,
    tokens: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    lora_seed: Tensor | None,
    dropout_p: float,
    lora_dropout_p: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, d_out], low_out [N, r] or [0], pre [k, entries, width]; see `sptc::routed_ffn` in docs/architecture.md."""
    hidden, wide = up[0].shape[0], _wide(x.dtype)
    act = compile_activation(activation, wide)
    dropout, lora_dropout = _Dropout(seed, dropout_p, hidden), _Dropout(lora_seed, lora_dropout_p, hidden)
    pre = x.new_empty((len(up), tokens.shape[0], hidden // (offsets.shape[0] - 1)))
    y = _sum(x.shape[0], down.shape[1], x.dtype)
    low_out = x.new_empty(0) if down_A is None else _sum(x.shape[0], down_A.shape[0], x.dtype)
    factor = None if scale is None else scale.to(wide).contiguous()

    def compute(block: _Block, a: Tensor) -> None:
        us = pre[:, block.entries].unbind(0)
        for i, u in enumerate(us):
            terms = [Term(x, up[i][block.units].t(), block.tokens)]
            if i in adapted:
                j = adapted.index(i)
                terms.append(Term(low[j], up_B[j][block.units].t(), block.tokens))
            multiply(u, terms, up_bias[biased.index(i)][block.units] if i in biased else None)
        act.forward([u.to(wide) for u in us], None if factor is None else factor[block.entries], a)
        a = dropout.apply(a, dropout.keep(block))
        add_rows(y, block.tokens, [Term(a.to(x.dtype), down[block.units])])
        if down_A is not None:
            a = lora_dropout.apply(a, lora_dropout.keep(block))
            add_rows(low_out, block.tokens, [Term(a.to(x.dtype), down_A[:, block.units].t())])

    def work(ranges: Iterator[_Range]) -> None:
        for part in ranges:
            scratch = part.scratch(pre.shape[2], wide)
            for block in part.blocks(tokens, hidden):
                compute(block, scratch[: len(block.tokens)])

    share(_ranges(tokens, offsets, x.shape[0]), work)
    pre[:, int(offsets[-1]) :].zero_()
    return y.to(x.dtype), low_out.to(x.dtype), pre


def routed_ffn_backward(
    grad_y: Tensor,
    grad_low_out: Tensor | None,
    x: Tensor,
    up: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    biased: Sequence[int],
    low: Sequence[Tensor],
    up_B: Sequence[Tensor],
    adapted: Sequence[int],
    down: Tensor,
    down_A: Tensor | None,
    tokens: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    lora_seed: Tensor | None,
    dropout_p: float,
    lora_dropout_p: float,
    activation: str,
    pre: Tensor,
    need: Sequence[bool],
) -> list[Tensor]:
    """Gradients in the order of `need`, [0] where not needed."""
    hidden, dtype, wide = up[0].shape[0], x.dtype, _wide(x.dtype)
    act, pre = compile_activation(activation, wide), pre.contiguous()
    dropout, lora_dropout = _Dropout(seed, dropout_p, hidden), _Dropout(lora_seed, lora_dropout_p, hidden)
    wanted = Need.read(need, len(up), len(up_bias), len(low))

    parts = _ranges(tokens, offsets, x.shape[0])

    def zeros(like: Tensor | None, flag: bool) -> Tensor:
        """For a gradient that all tokens add to: one for each range, to be summed."""
        return torch.zeros((len(parts), *like.shape), dtype=like.dtype) if flag and like is not None else x.new_empty((len(parts), 0))

    grad_x = _sum(x.shape[0], x.shape[1], dtype) if wanted.x else x.new_empty(0)
    grad_up = [zeros(w, flag) for w, flag in zip(up, wanted.up, strict=True)]
    grad_bias = [zeros(b, flag) for b, flag in zip(up_bias, wanted.up_bias, strict=True)]
    grad_low = [_sum(t.shape[0], t.shape[1], dtype) if flag else x.new_empty(0) for t, flag in zip(low, wanted.low, strict=True)]
    grad_B = [zeros(b, flag) for b, flag in zip(up_B, wanted.up_B, strict=True)]
    grad_down, grad_A = zeros(down, wanted.down), zeros(down_A, wanted.down_A)
    grad_scale = torch.zeros(scale.shape, dtype=wide) if wanted.scale and scale is not None else None
    factor = None if scale is None else scale.to(wide).contiguous()
    through = None if down_A is None or grad_low_out is None else (down_A, grad_low_out)
    needs_a = wanted.down or (wanted.down_A and through is not None)
    needs_u = wanted.x or any((*wanted.up, *wanted.up_bias, *wanted.low, *wanted.up_B))

    def compute(block: _Block, part: int, a: Tensor, grads: list[Tensor]) -> None:
        us = [u.to(wide) for u in pre[:, block.entries].unbind(0)]
        s = None if factor is None else factor[block.entries]
        keep, lora_keep = dropout.keep(block), lora_dropout.keep(block) if through else None
        if needs_u or grad_scale is not None:
            grad_hidden(grads[0], block, keep, lora_keep)
            act.backward(us, s, grads, a if needs_a else None, None if grad_scale is None else grad_scale[block.entries])
        elif needs_a:
            act.forward(us, None, a)
        rows = None if s is None else s.unsqueeze(1)
        if wanted.down:
            h = dropout.apply(a if rows is None else a * rows, keep)
            torch.mm(h.to(dtype).t(), grad_y.index_select(0, block.tokens), out=grad_down[part][block.units])
        if wanted.down_A and through is not None:
            low_rows = through[1].index_select(0, block.tokens)
            scaled = low_rows if rows is None else (low_rows * rows).to(dtype)  # r columns are cheaper to scale than a block of units
            grad_A[part][:, block.units] = scaled.t() @ lora_dropout.apply(dropout.apply(a, keep), lora_keep).to(dtype)
        if not needs_u:
            return
        grad_us = [grad.to(dtype) for grad in grads]
        if wanted.x:
            add_rows(grad_x, block.tokens, [Term(g, w[block.units]) for g, w in zip(grad_us, up, strict=True)])
        if any(wanted.up):
            inputs = x.index_select(0, block.tokens)
        for i, g in enumerate(grad_us):
            if wanted.up[i]:
                torch.mm(g.t(), inputs, out=grad_up[i][part][block.units])
        for j, i in enumerate(biased):
            if wanted.up_bias[j]:
                grad_bias[j][part][block.units] = grad_us[i].sum(0)
        for j, i in enumerate(adapted):
            if wanted.low[j]:
                add_rows(grad_low[j], block.tokens, [Term(grad_us[i], up_B[j][block.units])])
            if wanted.up_B[j]:
                torch.mm(grad_us[i].t(), low[j].index_select(0, block.tokens), out=grad_B[j][part][block.units])

    def grad_hidden(grad: Tensor, block: _Block, keep: Tensor | None, lora_keep: Tensor | None) -> None:
        """Fill `grad` with the gradient in scale * act(us): through down, and through its adapter."""
        terms, late = [Term(grad_y, down[block.units].t(), block.tokens)], None
        if through is not None:
            late = Term(through[1], through[0][:, block.units], block.tokens)
            if lora_keep is None:
                terms, late = [*terms, late], None
        multiply(grad, terms)
        if late is not None:
            adapted_grad = torch.empty_like(grad)
            multiply(adapted_grad, [late])
            grad += lora_dropout.apply(adapted_grad, lora_keep)
        if keep is not None:
            grad.copy_(dropout.apply(grad, keep))

    def work(ranges: Iterator[_Range]) -> None:
        for part in ranges:
            scratch = [part.scratch(pre.shape[2], wide) for _ in range(len(up) + 1)]
            for block in part.blocks(tokens, hidden):
                a, *grads = (t[: len(block.tokens)] for t in scratch)
                compute(block, part.index, a, grads)

    share(parts, work)
    shared = [
        [total[0] if len(parts) == 1 else total.sum(0) for total in totals] for totals in (grad_up, grad_bias, grad_B, [grad_down, grad_A])
    ]
    sums = [total.to(dtype) for total in (grad_x, *grad_low)]
    return [
        sums[0],
        *shared[0],
        *shared[1],
        *sums[1:],
        *shared[2],
        *shared[3],
        x.new_empty(0) if grad_scale is None or scale is None else grad_scale.to(scale.dtype),
    ]


def _sum(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Where the blocks of a token are added up, one after the other; `index_add_` on a CPU goes through its rows in order."""
    return torch.zeros((rows, columns), dtype=_wide(dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the activation is computed in."""
    return dtype if dtype == torch.float64 else torch.float32
