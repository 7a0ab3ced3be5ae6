"""What trainable state starts from: each fit against data whose best fit is known, and on data that tells nothing."""

from __future__ import annotations

import pytest
import torch

from sptc.paper.fit import CODEWORDS, STAND_IN_RANK, STAND_IN_RIDGE, fit_codebooks, fit_router, fit_stand_in, subvectors


@pytest.mark.parametrize("head, m", [(64, 8), (80, 10), (8, 1), (20, 2), (12, 2), (7, 1), (4, 1), (128, 16)])
def test_subvectors(head, m):
    assert subvectors(head) == m and head % m == 0


def test_k_means_finds_separate_clusters_again():
    generator = torch.Generator().manual_seed(0)
    centres = 100 * torch.randn(2, 3, CODEWORDS, 8, generator=generator)  # [h_kv, M, E, ds]
    member = torch.randint(CODEWORDS, (400,), generator=generator)
    vectors = centres[:, :, member].transpose(1, 2).reshape(2, 400, 24) + 0.01 * torch.randn(2, 400, 24, generator=generator)
    books = fit_codebooks(vectors, iterations=20)
    assert books.shape == (2, 3, CODEWORDS, 8) and books.dtype is torch.float32
    points = vectors.view(2, 400, 3, 8).transpose(1, 2)
    error = torch.cdist(points, books).amin(-1).square().mean()
    spread = (points - points.mean(2, keepdim=True)).square().sum(-1).mean()
    assert error < 0.2 * spread  # some clusters may share a codeword: Lloyd's iterations find a local optimum
    assert torch.equal(books, fit_codebooks(vectors, iterations=20))
    first = fit_codebooks(vectors, iterations=1)
    assert error < torch.cdist(points, first).amin(-1).square().mean()


@pytest.mark.parametrize("rows", [1, 5])
def test_k_means_of_fewer_rows_than_codewords_holds_the_rows(rows):
    vectors = torch.randn(2, rows, 16, dtype=torch.bfloat16)
    books = fit_codebooks(vectors)
    points = vectors.float().view(2, rows, 2, 8).transpose(1, 2)
    assert torch.cdist(points, books).amin(-1).max() < 1e-3
    with pytest.raises(ValueError, match="at least one"):
        fit_codebooks(vectors[:, :0])


def test_a_router_starts_with_what_a_linear_map_can_tell_of_its_blocks_outputs():
    torch.manual_seed(0)
    x, slopes, levels = torch.randn(400, 8) + 0.5, torch.randn(4, 8), torch.tensor([10.0, 12.0, 14.0, 30.0])
    told = x @ slopes.T + levels
    norms = told + 1e-3 * torch.randn(400, 4)
    weight, bias = fit_router(x, norms, rms=0.7)
    logits = x @ weight.T + bias
    torch.testing.assert_close(logits.square().mean().sqrt(), torch.tensor(0.7))
    wanted = told - told.mean(1, keepdim=True)
    moves, told_moves = (t - t.mean(0) for t in (logits, wanted))
    assert torch.corrcoef(torch.stack((moves.flatten(), told_moves.flatten())))[0, 1] > 0.99
    torch.testing.assert_close(logits.mean(0) / logits.mean(0).norm(), wanted.mean(0) / wanted.mean(0).norm(), atol=1e-4, rtol=0)
    assert (logits.topk(2).indices.sort().values == told.topk(2).indices.sort().values).float().mean() > 0.9, "shrunk by the ridge"
    for rows, target in ((x[:1], norms[:1]), (x, torch.ones(400, 4)), (torch.zeros(5, 8), norms[:5]), (x, torch.zeros(400, 4))):
        assert all(torch.isfinite(t).all() for t in fit_router(rows, target))


def test_a_stand_in_is_the_best_ridge_regression_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) * torch.linspace(0.2, 3.0, 12) + 1.0
    missing = (x @ torch.randn(12, 9, generator=generator) + torch.randn(500, 9, generator=generator)).relu() + 2.0

    def loss(low, high, constant):
        """What ridge regression minimizes; its penalty falls on the map, not on the constant."""
        error = x @ low.T @ high.T + constant - missing / (2 * 0.5)
        return error.square().sum() + STAND_IN_RIDGE * (x - x.mean(0)).square().sum(0).mean() * (high @ low).square().sum()

    fitted = [t.double() for t in fit_stand_in(x, missing, 0.5, rank=3)]
    x, missing = x.double(), missing.double()
    assert [t.shape for t in fitted] == [(3, 12), (9, 3), (9,)]
    best = loss(*fitted)
    torch.manual_seed(1)
    for start in range(3):  # no descent from elsewhere gets below it, and one gets there
        moving = [torch.randn_like(t).requires_grad_() for t in fitted]
        optimizer = torch.optim.LBFGS(moving, max_iter=500, line_search_fn="strong_wolfe")

        def closure(moving=moving, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(*moving)
            value.backward()
            return value

        optimizer.step(closure)
        reached = loss(*moving).item()
        assert best < reached * (1 + 1e-6)
        if start == 0:
            first = reached
    assert best > 0.9 * first
    torch.testing.assert_close(fitted[0].norm(dim=1), fitted[1].norm(dim=0))


def test_a_stand_in_of_data_that_tells_nothing_is_finite_and_as_large_as_any():
    x = torch.randn(40, 32)
    full = [t.shape for t in fit_stand_in(x, torch.randn(40, 24), 0.5)]
    assert full == [(STAND_IN_RANK, 32), (24, STAND_IN_RANK), (24,)]
    for rows, missing in ((x[:1], torch.ones(1, 24)), (torch.zeros(5, 32), torch.ones(5, 24)), (x, torch.zeros(40, 24))):
        state = torch.get_rng_state()
        low, high, constant = fit_stand_in(rows, missing, 0.25)
        assert torch.equal(torch.get_rng_state(), state)
        assert [t.shape for t in (low, high, constant)] == full and all(t.isfinite().all() for t in (low, high, constant))
        assert not low.any() and high.any(), "it can train"
        torch.testing.assert_close(constant, 2 * missing.mean(0))
