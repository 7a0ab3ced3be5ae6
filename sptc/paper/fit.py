"""What trainable state starts from: codebooks, routers and stand-ins, fitted to what the example batch shows of a region."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CODEWORDS = 16  # E: codewords of a subspace (PAPER.md, Sparse MHA)
SUBVECTOR = 8  # elements of a sub-vector (PAPER.md)
ROUTER_RIDGE = 0.3  # of the mean square of the inputs, in the regression of a router: for batches of few tokens
STAND_IN_RIDGE = 0.1  # the same of a stand-in, whose rank bounds it too
STAND_IN_RANK = 16  # of what stands in for blocks that a token leaves out; LoRA's usual rank, a few hundredths of an FFN's products
STAND_IN_SCALING = 2.0  # as LoRA's alpha over its rank, usually: how fast it learns beside the adapters
_OVERSAMPLED = 8  # directions that a truncated decomposition follows beyond those that it keeps


def subvectors(head_size: int) -> int:
    """M: into how many sub-vectors a head is cut; their size is the divisor of the head's that is nearest to 8 (the smaller of two)."""
    size = min((n for n in range(1, head_size + 1) if head_size % n == 0), key=lambda n: (abs(n - SUBVECTOR), n))
    return head_size // size


def fit_codebooks(vectors: Tensor, iterations: int = 8, seed: int = 0) -> Tensor:
    """Codebooks for queries and keys by k-means: Lloyd's iterations from E rows drawn by `seed`, the same on every device.

    Args:
        vectors: [h_kv, N, d], any floating dtype; N rows of queries and keys, after rotary embedding.

    Returns:
        fp32 [h_kv, M, E, d / M].
    """
    heads, rows, d = vectors.shape
    if rows == 0:
        raise ValueError("fit_codebooks needs at least one vector")
    m = subvectors(d)
    points = vectors.detach().to(torch.float32).reshape(heads, rows, m, d // m).transpose(1, 2)  # [h_kv, M, N, ds]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    start = order.repeat(-(-CODEWORDS // rows))[:CODEWORDS].to(points.device)
    codebooks = points.index_select(2, start).clone()  # [h_kv, M, E, ds]
    for _ in range(iterations):
        codes = torch.cdist(points, codebooks).argmin(-1)  # [h_kv, M, N]
        chosen = nn.functional.one_hot(codes, CODEWORDS).to(points.dtype)  # [h_kv, M, N, E]
        counts = chosen.sum(2).unsqueeze(-1)  # [h_kv, M, E, 1]
        mean = chosen.transpose(-1, -2) @ points / counts.clamp(min=1)
        codebooks = torch.where(counts > 0, mean, codebooks)
    return codebooks.contiguous()


def fit_router(x: Tensor, norms: Tensor, rms: float = 1.0) -> tuple[Tensor, Tensor]:
    """The start of a router: ridge regression of how much each block adds to a token's output, from the token.

    Norms are centred over the blocks of a token: which block adds more than others is what chooses. Logits get the RMS `rms` on the batch,
    which says how far training has to move them to choose otherwise.

    Args:
        x: [N, d] inputs of the region on the example batch.
        norms: [N, G], the L2 norm of each block's output.

    Returns:
        weight [G, d] and bias [G], fp32.
    """
    target = norms.detach().double()
    target = target - target.mean(1, keepdim=True)
    weight, centre, mean, _ = _regression(x, target, ROUTER_RIDGE)
    bias = mean - weight @ centre
    spread = (x.detach().double() @ weight.T + bias).square().mean().sqrt()
    # Blocks that add alike, as far as the batch shows: no spread to go by.
    floor = (1e-3 * norms.double().square().mean().sqrt()).clamp(min=torch.finfo(torch.float32).tiny)
    scale = rms / torch.maximum(spread, floor)
    return (scale * weight).float(), (scale * bias).float()


def fit_stand_in(x: Tensor, missing: Tensor, share: float, rank: int = STAND_IN_RANK) -> tuple[Tensor, Tensor, Tensor]:
    """The start of a stand-in: ridge regression of what left-out blocks would add, from the token, cut to the best `rank` directions.

    Args:
        x: [N, d] inputs of the region on the example batch.
        missing: [N, d_out], the sum of the outputs of the blocks that a token leaves out.
        share: of the blocks, how many a token leaves out; `missing` is taken to grow with it.

    Returns:
        low [r, d], high [d_out, r] and constant [d_out], fp32, with missing = 2 share * (x low^T high^T + constant) nearly;
        r = min(rank, d, d_out). Rows of `low` and columns of `high` have equal norms, so that both train alike.
    """
    weight, centre, mean, factor = _regression(x, missing.detach().double() / (STAND_IN_SCALING * share), STAND_IN_RIDGE)
    rank = min(rank, *weight.shape)
    # The ridge regression of rank r is the full one on the first right singular vectors of factor^T weight^T.
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # the decomposition starts from random directions
        torch.manual_seed(0)
        _, _, directions = torch.svd_lowrank(factor.T @ weight.T, min(rank + _OVERSAMPLED, *weight.shape), niter=4)
    high = directions[:, :rank]
    low = high.T @ weight
    sizes = low.norm(dim=1).sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)  # a direction that tells nothing begins at 0, as LoRA does
    return (low / sizes.unsqueeze(1)).float(), (high * sizes).float().contiguous(), (mean - high @ (low @ centre)).float()


def _regression(x: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ridge regression of target [N, c] (fp64) on x [N, d], both centred.

    Returns:
        weight [c, d], the centre [d] of x, the mean [c] of the target, the Cholesky factor [d, d] of the Gram matrix with its ridge.
    """
    points = x.detach().double()
    centre, mean = points.mean(0), target.mean(0)
    points = points - centre
    gram = points.T @ points
    power = gram.diagonal().mean()
    gram.diagonal().add_(torch.where(power > 0, ridge * power, 1.0))
    factor = torch.linalg.cholesky(gram)
    weight = torch.cholesky_solve(points.T @ (target - mean), factor).T
    return weight, centre, mean, factor
