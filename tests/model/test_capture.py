import copy
import random

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from sptc.model.capture import CaptureError, capture


class Broken(nn.Module):
    """Two graphs, a buffer counted up in place, one changed by batch norm, and random numbers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.calls.add_(1)
        x = self.norm(self.linear(x)).relu()
        torch._dynamo.graph_break()
        x = x * random.randint(1, 2)
        return self.linear(torch.dropout(x, 0.5, self.training)) * scale


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Broken()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("make, graphs", [(Broken, 2), (Outer, 3), (lambda: nn.Sequential(Broken(), nn.Tanh()), 2)])
def test_every_graph_is_seen_and_nothing_is_changed(make, graphs):
    model = make()
    before = copy.deepcopy(model.state_dict())
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    seen = []
    capture(model, torch.ones(3, 4), lambda gm, inputs: seen.append((gm, inputs)))
    assert len(seen) == graphs
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert _debug_get_cache_entry_list(Broken.forward.__code__) == []


def test_each_run_starts_from_the_same_state():
    model, graphs, outputs = Broken(), [], []
    before = copy.deepcopy(model.state_dict())

    def again(output: torch.Tensor) -> bool:
        outputs.append(output)
        return len(outputs) < 3

    capture(model, torch.ones(3, 4), lambda gm, inputs: graphs.append(gm), again)
    assert len(graphs) == 2 and len(outputs) == 3
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_compiled_code_of_the_user_stays(how):
    shapes = []

    def backend(gm, inputs):
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 2])
        return gm.forward

    model = Broken().eval()
    if how == "torch.compile":
        compiled = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
        compiled = model
    compiled(torch.ones(3, 4))
    assert len(shapes) == 2
    for _ in range(3):
        seen = []
        capture(compiled, torch.ones(5, 4), lambda gm, inputs: seen.append(gm))  # noqa: B023
        assert len(seen) == 2, "the collector looks inside what was compiled"
    compiled(torch.ones(3, 4))
    assert len(shapes) == 2, "and leaves its cached code alone"


def test_sizes_seen_while_capturing_do_not_make_the_next_compile_dynamic():
    inputs = []
    model = Broken()
    capture(model, torch.ones(5, 4), lambda gm, _: None)
    torch.compile(model, backend=lambda gm, args: inputs.extend(args) or gm.forward)(torch.ones(3, 4))
    assert inputs and not any(isinstance(x, torch.SymInt) for x in inputs)


def test_functions_and_all_forms_of_example_inputs():
    model = Broken()

    def loss(x, scale=1.0):
        return model(x, scale).sum()

    x = torch.ones(3, 4)
    for target, inputs in [(model, (x,)), (model, [x, 2.0]), (loss, {"x": x, "scale": 2.0}), (model.forward, x)]:
        seen = []
        capture(target, inputs, lambda gm, _: seen.append(gm))  # noqa: B023
        assert len(seen) >= 2
    assert model.calls == 0
    with pytest.raises(CaptureError, match="must be a tensor"):
        capture(model, 3, lambda gm, _: None)


def test_errors_come_through_as_they_are():
    def fail(gm, inputs):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        capture(Broken(), torch.ones(3, 4), fail)
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        capture(Broken(), torch.ones(3, 5), lambda gm, _: None)
    with pytest.raises(CaptureError, match="no graph"):
        capture(lambda x: 3, torch.ones(1), lambda gm, _: None)
