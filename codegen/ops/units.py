"""Ops that choose the tokens and hidden units of an FFN over fewer units. Choices have no gradient; what is computed on them is plain ATen.

Each is an op of its own so that a choice is made once: no partitioner computes it again in backward, where rounding could change it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from sptc.ir import sample
from sptc.ir.hint import optimization_hint

_lib = torch.library.Library("sptc", "FRAGMENT")
_lib.define("split_tokens(Tensor counted) -> (Tensor, Tensor)")
_lib.define("rows_where(Tensor mask) -> Tensor")
_lib.define("in_steps(Tensor mask, Tensor spare) -> Tensor")
_lib.define("sample_tokens(Tensor x, Tensor? mask) -> Tensor")
_lib.define("choose_units(Tensor energy, int units) -> Tensor")
_lib.define("fit_linear(Tensor x, Tensor y, int rank) -> (Tensor, Tensor)")


def split_tokens(counted: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers where a mask, bool [N], is true, and those where it is false: int64 [c] and [N - c], each ascending."""
    return counted.nonzero().squeeze(1), counted.logical_not().nonzero().squeeze(1)


def _some_of(rows: int | torch.SymInt) -> torch.SymInt:
    """A number of rows that is data: an unbacked size, so that no other number compiles again.

    Who needs a number to plan with takes half of the rows. Torch would take thousands, so that what is left of the rows had a negative
    size, and the partitioner kept it for backward as if it were free.
    """
    # `new_dynamic_size` would want a global switch for it.
    env = torch.library.get_ctx()._shape_env
    count = allocate_size(env)
    env.var_to_hint_override[count.node.expr] = optimization_hint(rows) // 2
    return count


def _split_fake(counted: Tensor) -> tuple[Tensor, Tensor]:
    count = _some_of(counted.shape[0])
    rest = counted.shape[0] - count
    torch._check(rest >= 0)
    return counted.new_empty(count, dtype=torch.int64), counted.new_empty(rest, dtype=torch.int64)


def rows_where(mask: Tensor) -> Tensor:
    """Row numbers where a mask, bool [N], is true: int64 [k], ascending."""
    return mask.nonzero().squeeze(1)


def _where_fake(mask: Tensor) -> Tensor:
    return mask.new_empty(_some_of(mask.shape[0]), dtype=torch.int64)


SHARES = 16
"""Numbers of rows that products have, of all tokens, where that is data.

oneDNN makes a kernel for each number of rows, up to a megabyte in a millisecond, and keeps the last 1,024 of them. Batches are padded each
in its own way and labels count here and there, so that no two have the same numbers, and the process would grow with each. So rows are
rounded up: here, in `block_products`, and to one of eight shares of a chunk in the last chunk of a loss.
"""
_FEW = 256  # tokens below which any number may be


def lengthened(rows: Tensor, number: int) -> Tensor:
    """`rows`, [n, ...], the last one repeated until there are `number`, n or more. n is not 0."""
    more = number - rows.shape[0]
    return torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])]) if more else rows


def in_steps(mask: Tensor, spare: Tensor) -> Tensor:
    """A mask, bool [N], with as many of the first rows of `spare`, bool [N], as make the number of true rows one of 16 shares of N.

    Products of what follows have few numbers of rows (`SHARES`). Where `spare` has fewer rows all of these are taken; of less than 256
    tokens none is.
    """
    rows = mask.shape[0]
    if rows < _FEW:
        return mask.clone()
    count = mask.sum()
    steps = (count * SHARES + rows - 1) // rows
    missing = (steps * rows + SHARES - 1) // SHARES - count
    others = spare & ~mask
    return mask | (others & (others.cumsum(0) <= missing))


def _in_steps_fake(mask: Tensor, spare: Tensor) -> Tensor:
    return torch.empty_like(mask)


def sample_size(tokens: int) -> int:
    """How many of `tokens` rows energies are measured on."""
    return torch.sym_min(tokens, tokens // sample.SHARE + sample.LEAST)


def sample_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """`sample_size(N)` row numbers of x [N, ...], evenly spread over those where `mask`, bool [N], is true: int64, ascending.

    Rows repeat where there are fewer; without any true row all are taken from. The size depends on N alone.
    """
    size = sample_size(x.shape[0])
    places = torch.arange(size, device=x.device)
    if mask is None:
        return places * x.shape[0] // size
    mask = mask | ~mask.any()
    before = mask.cumsum(0)  # rank of each true row, from 1
    return torch.searchsorted(before, places * before[-1] // size, right=True)


def _sample_fake(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty(sample_size(x.shape[0]), dtype=torch.int64)


def choose_units(energy: Tensor, units: int) -> Tensor:
    """The `units` largest of `energy` [hidden]: int64 [units], ascending. A unit whose energy is not a number counts as the largest."""
    return energy.topk(units).indices.sort().values


def _choose_fake(energy: Tensor, units: int) -> Tensor:
    return energy.new_empty(units, dtype=torch.int64)


_RIDGE = 0.3  # of the mean squared length of a row of x, added to the diagonal: else the map followed single tokens of the sample


def fit_linear(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The linear map of `rank` that gives about y [n, d_out] of x [n, d]: a [rank, d] and b [d_out, rank], so that y is about x a^T b^T.

    Ridge regression, as the n rows are a sample, fewer than d as a rule: y_i ~ x_i X^T (X X^T + l)^-1 Y; of that, what lies in the span of
    `rank` of the fitted rows. Computed in fp32 at least; rows that are not finite are left out. Both are of x's dtype.
    """
    if not x.shape[0]:
        return x.new_zeros(rank, x.shape[1]), x.new_zeros(y.shape[1], rank)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        finite = (x.sum(1, dtype=dtype) + y.sum(1, dtype=dtype)).isfinite()[:, None]
        given, wanted = (torch.where(finite, t, 0).to(dtype) for t in (x, y))
        gram = given @ given.t()
        ridge = _RIDGE * gram.diagonal().mean()
        gram.diagonal().add_(torch.where(ridge > 0, ridge, 1.0))
        lower = torch.linalg.cholesky_ex(gram).L
        some = torch.arange(rank, device=x.device) * x.shape[0] // rank
        picked = torch.zeros_like(gram[:, :1]).repeat(1, rank).scatter_(0, some[None], 1.0)
        # The matrix solves for a few columns alone, of which the rows that are fitted are made.
        fitted = wanted[some] - ridge * (torch.cholesky_solve(picked, lower).t() @ wanted)
        span = torch.linalg.qr(fitted.t()).Q
        a = torch.mm(torch.cholesky_solve(wanted @ span, lower).t(), given)
        return a.to(x.dtype), span.contiguous().to(x.dtype)


def _fit_fake(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(rank, x.shape[1]), x.new_empty(y.shape[1], rank)


for _name, _function, _fake in (
    ("split_tokens", split_tokens, _split_fake),
    ("rows_where", rows_where, _where_fake),
    ("in_steps", in_steps, _in_steps_fake),
    ("sample_tokens", sample_tokens, _sample_fake),
    ("choose_units", choose_units, _choose_fake),
    ("fit_linear", fit_linear, _fit_fake),
):
    for _key in ("CPU", "CUDA"):
        _lib.impl(_name, _function, _key)
    torch.library.register_fake(f"sptc::{_name}", _fake, lib=_lib)
