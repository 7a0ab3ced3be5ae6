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
from sptc.paper.state import (
    CODEBOOK_DECAY,
    MARK,
    Codebook,
    DenseNotice,
    Router,
    TrainableState,
    attach,
    map_first_floating,
    owners,
    parse_layout,
    strip,
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
            router = Router((torch.randn(2, 4), torch.randn(2)), (torch.randn(1, 4), torch.randn(4, 1), torch.randn(4)), "down.weight")
            attach(owner, TrainableState({"ffn0": router, "attention0": Codebook(torch.randn(3, 2, 16, 8))}, notice))

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
    with caplog.at_level(logging.WARNING, "sptc.paper.state"):
        assert torch.equal(model(x), plain)
        model(x)
        assert len(caplog.records) == 1
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # they lost what `Module.compile` did
            caplog.clear()
            twin(x)
            twin(x)
            assert len(caplog.records) == 1
    for _, owner in list(owners(model)):
        strip(owner)
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
