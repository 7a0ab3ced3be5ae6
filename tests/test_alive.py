"""Nothing of a trial survives it: what is left after explain, plan, prepare and training are the model, its state and what is returned."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import sptc
from sptc.paper import trial
from tests.models.compiled import without_inductor

OPTIONS = {"decline": "never", "attention.selector": "pq", "attention.query_block": 4, "attention.key_block": 4}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.down(torch.relu(self.up(x)))


class Broken(nn.Module):
    """Two graphs: Dynamo keeps what it compiled for the second one in the globals of the frame that goes on after the break."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(32, 300)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.head(self.second(x))


def live() -> Counter:
    """Shapes and dtypes of the tensors that hold memory; fakes and empty ones hold none."""
    gc.collect()
    found: Counter = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance asks lazy modules of torch
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor) and thing.numel():
                found[tuple(thing.shape), thing.dtype] += 1
    return found


def trained(model, x):
    compiled = torch.compile(model, backend=without_inductor(**OPTIONS))
    for _ in range(2):
        compiled(x).square().mean().backward()
    model.zero_grad(set_to_none=True)
    torch._dynamo.reset()


def prepared_and_detached(model, x):
    sptc.prepare(model, x, OPTIONS)
    sptc.detach(model)


RUNS = {
    "explain": lambda model, x: sptc.explain(model, x, OPTIONS),
    "plan": lambda model, x: sptc.plan(model, x, max_error=0.5, options={"decline": "never"}),
    "prepare": prepared_and_detached,
    "train": trained,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_no_tensor_survives(run):
    torch.manual_seed(0)
    model, x = nn.Sequential(Broken()), torch.randn(2, 19, 32)
    RUNS["explain"](model, x)  # what is made once a process: random seeds, caches of torch
    before = live()
    run(model, x)
    assert live() - before == Counter()


class Rotating(nn.Module):
    """As rotary embeddings are: the first thing in the graph is a block without gradients, at whose end they are switched on."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        with torch.no_grad():
            scale = x.square().mean(-1, keepdim=True).rsqrt()
        return self.block(x * scale)


def test_a_trial_keeps_nothing_for_gradients():
    saved = []
    model, x = nn.Sequential(Rotating()), torch.randn(2, 19, 32)

    def keep(tensor):
        if not isinstance(tensor, FakeTensor):  # tracing has gradients, but no memory
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        report = sptc.prepare(model, x, OPTIONS)
    assert [r.status for r in report.regions] == ["rewritten", "rewritten"] and not saved


@pytest.mark.parametrize("shared", [False, True])
def test_prepare_holds_the_samples_of_one_region_at_a_time(monkeypatch, shared):
    """A router is fitted to all calls of its FFN in a graph; codebooks are those of one call."""
    held: list[weakref.ref] = []
    most, rows = [], []
    evenly, fit = trial._evenly, trial.fit_router

    def watched(*args):
        value = evenly(*args)
        held.append(weakref.ref(value))
        most.append(sum(ref() is not None for ref in held))
        return value

    def counted(x, *args):
        rows.append(len(x))
        return fit(x, *args)

    monkeypatch.setattr(trial, "_evenly", watched)
    monkeypatch.setattr(trial, "fit_router", counted)
    block = Block()
    model = nn.Sequential(*(block if shared else Block() for _ in range(4)))
    sptc.prepare(model, torch.randn(2, 9, 32), {**OPTIONS, "ffn.selector": "router", "ffn.blocks": 4})
    assert len(most) == 16  # queries, keys, inputs and hidden units of four blocks
    assert max(most) == (8 if shared else 2) and rows == ([4 * 18] if shared else [18] * 4)
