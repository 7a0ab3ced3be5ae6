"""Trainable state: what it holds through a model's life, how it starts, and a hook that does nothing in eager mode."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sptc
from sptc.state import (
    CODEBOOK_DECAY,
    CODEWORDS,
    MARK,
    Codebook,
    DenseNotice,
    Router,
    TrainableState,
    attach,
    detach,
    fit_codebooks,
    fit_router,
    map_first_floating,
    owners,
    parse_layout,
    subvectors,
)

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    ids: torch.Tensor
    hidden: torch.Tensor


class Model(nn.Module):
    """Two owners that share one notice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        notice = DenseNotice()
        for owner in (self.a, self.b):
            slots = {"ffn0": Router(torch.randn(2, 4), torch.randn(2), "down.weight"), "attention0": Codebook(torch.randn(3, 2, 16, 8))}
            attach(owner, TrainableState(slots, notice))

    def forward(self, x):
        return self.b(self.a(x))


def output_cases():
    from transformers.modeling_outputs import BaseModelOutput

    x, ids = torch.randn(3), torch.arange(3)
    yield "tensor", x, lambda out: out
    yield "tuple", (ids, x, x), lambda out: out[1]
    yield "list", [None, x], lambda out: out[1]
    yield "nested", ("text", (ids, [x])), lambda out: out[1][1][0]
    yield "namedtuple", Pair(ids, x), lambda out: out.second
    yield "dict", {"ids": ids, "x": x}, lambda out: out["x"]
    yield "dataclass", Output(ids, x), lambda out: out.hidden
    yield "ModelOutput", BaseModelOutput(last_hidden_state=x, hidden_states=(x,)), lambda out: out.last_hidden_state


@pytest.mark.parametrize("output, find", [pytest.param(o, f, id=name) for name, o, f in output_cases()])
def test_the_first_floating_tensor_is_marked_and_the_container_rebuilt(output, find):
    x = find(output)
    marked = map_first_floating(output, lambda t: t + 1)
    assert type(marked) is type(output)
    assert torch.equal(find(marked), x + 1)
    assert find(output) is x and torch.all(find(output) != find(marked))  # the original is as it was


def test_an_output_without_floating_tensors_is_left_alone():
    output = (torch.arange(3), "text")
    assert map_first_floating(output, lambda t: t + 1) is output


def test_mark_is_an_identity_for_values_and_gradients():
    x = torch.randn(4, 3).t().requires_grad_()
    y = MARK(x, [torch.randn(2, requires_grad=True)], "ffn0:w", True)
    assert torch.equal(y, x) and y.data_ptr() == x.data_ptr() and y.stride() == x.stride()
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, 2 * x)


def test_eager_is_untouched_and_says_once_a_model_that_it_is_dense(caplog):
    model, x = Model(), torch.randn(2, 4)
    plain = model.b.forward(model.a.forward(x))
    with caplog.at_level(logging.WARNING, "sptc.state"):
        assert torch.equal(model(x), plain)
        model(x)
        assert len(caplog.records) == 1
        copy.deepcopy(Model())(x)
    assert len(caplog.records) == 2
    for _, owner in list(owners(model)):
        detach(owner)
    assert not list(owners(model)) and not hasattr(model.a, "spt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_buffers_stay_in_single_precision(dtype):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    model.to(dtype)
    slots = model.a.spt.slots()
    assert slots["ffn0"].weight.dtype is dtype
    for name in ("codebooks", "code_sums", "code_counts"):
        buffer = getattr(slots["attention0"], name)
        assert buffer.dtype is torch.float32 and torch.equal(buffer, before[f"a.spt.attention0.{name}"])
    model.to("meta")
    assert slots["attention0"].codebooks.is_meta


def test_state_dict_copies_and_pickles_carry_the_state():
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mine, theirs = model.b.spt, twin.b.spt
        assert theirs.layout == mine.layout == "ffn0:down.weight,attention0"
        for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(a, b) and a is not b
        assert len(list(owners(twin))) == 2
    assert [(s.name, s.kind, s.index, s.down) for s in parse_layout(mine.layout)] == [
        ("ffn0", "ffn", 0, "down.weight"),
        ("attention0", "attention", 0, ""),
    ]


def test_step_moves_used_codewords_towards_their_mean_in_place():
    model = Model()
    book = model.a.spt.slots()["attention0"]
    before, address = book.codebooks.clone(), book.codebooks.data_ptr()
    vectors = torch.randn(5, 8)
    book.code_sums[1, 0, 3] = vectors.sum(0)
    book.code_counts[1, 0, 3] = 5
    sptc.step(model)
    expected = before.clone()
    expected[1, 0, 3] = CODEBOOK_DECAY * before[1, 0, 3] + (1 - CODEBOOK_DECAY) * vectors.mean(0)
    torch.testing.assert_close(book.codebooks, expected)
    assert torch.equal(book.codebooks[0], before[0]) and book.codebooks.data_ptr() == address
    assert not book.code_sums.any() and not book.code_counts.any()


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
