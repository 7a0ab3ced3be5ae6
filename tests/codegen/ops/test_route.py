"""Which blocks each token uses: `sptc::route`, with and without tokens that are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sptc.codegen.ops  # noqa: F401
from sptc.codegen.reference import route as reference

ops = torch.ops.sptc
pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


def test_route_is_the_definition():
    torch.manual_seed(0)
    scores = torch.randn(37, 8)
    scores[3] = 0.5  # ties
    scores[4, 2] = float("nan")
    scores[5] = torch.tensor([1.0, 2, 2, 2, 1, 2, 0, 0])
    for active in (1, 3, 8):
        got, want = ops.route(scores, active), reference.route(scores, active)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    tokens, blocks, offsets = ops.route(scores, 3)
    assert [g for g in range(8) if 3 in tokens[offsets[g] : offsets[g + 1]]] == [0, 1, 2] == blocks[tokens == 3].tolist()


@st.composite
def routed(draw):
    """Scores with ties [N, G], active, keep [N]."""
    count, blocks = draw(st.integers(0, 17)), draw(st.integers(1, 9))
    rows = st.lists(st.integers(0, 3), min_size=blocks, max_size=blocks)
    scores = draw(st.lists(rows, min_size=count, max_size=count))
    keep = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    scores = torch.tensor(scores, dtype=torch.float32).reshape(count, blocks)
    return scores, draw(st.integers(1, blocks)), torch.tensor(keep, dtype=torch.bool)


@settings(max_examples=200, deadline=None)
@given(routed())
def test_route_gives_kept_tokens_more_of_the_same_total(case):
    scores, active, keep = case
    (count, blocks), kept = scores.shape, int(keep.sum())
    lists = reference.route(scores, active, keep)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ops.route(scores, active, keep), lists, strict=True))
    tokens, block, offsets = lists
    assert len(tokens) == offsets[-1] == count * active  # not one entry of padding
    used = torch.zeros(count, blocks, dtype=torch.bool).index_put((tokens, block), torch.tensor(True))
    amounts = used.sum(1)
    assert amounts.sum() == count * active  # no pair twice
    for row, chosen, amount in zip(scores, used, amounts.tolist(), strict=True):
        assert torch.equal(chosen.nonzero().flatten(), torch.sort(row, descending=True, stable=True).indices[:amount].sort().values)
    if kept and kept < count:
        most, others = amounts[keep], amounts[~keep]
        assert most.min() == most.max() >= active >= others.max() >= others.min() >= max(1, active // 2)
        assert others.max() - others.min() <= 1
        spare = others.sum() - max(1, active // 2) * len(others)
        assert most[0] == blocks or spare < kept  # no kept token could have one more
    if kept in (0, count) or active in (1, blocks):
        assert all(torch.equal(a, b) for a, b in zip(lists, reference.route(scores, active), strict=True))


def test_blocks_left_over_are_spread_among_the_tokens_not_kept():
    scores, keep = torch.rand(12, 8), torch.zeros(12, dtype=torch.bool)
    keep[[1, 2, 7]] = True
    assert ops.route(scores, 4, keep)[0].bincount().tolist() == [2, 8, 8, 3, 3, 2, 3, 8, 3, 2, 3, 3]


def test_opcheck_route():
    scores = torch.randn(7, 4, requires_grad=True)
    torch.library.opcheck(ops.route.default, (scores, 2))
    torch.library.opcheck(ops.route.default, (scores, 2, torch.arange(7) % 3 == 0))


def test_route_rejects_too_many_blocks():
    with pytest.raises(ValueError, match="active=5"):
        ops.route(torch.zeros(3, 4), 5)


@pytest.mark.parametrize("keep", [torch.zeros(4, dtype=torch.bool), torch.zeros(3), torch.zeros(3, 1, dtype=torch.bool)])
def test_route_rejects_a_mask_of_other_tokens(keep):
    with pytest.raises(ValueError, match=r"keep must be bool \[3\]"):
        ops.route(torch.zeros(3, 4), 2, keep)
