"""Everything with an effect stays, in its place: each program equals eager in what it returns, writes and draws, and in every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from sptc.backend import compile_graph
from sptc.config import Config
from sptc.passes.graph.effects import alias_sets, has_effects, written_by
from sptc.passes.graph.pattern import op
from tests.capture import capture
from tests.models.compiled import assert_gradients_close

calls: list[float] = []


@torch.library.custom_op("sptc_test::noted", mutates_args=())
def noted(x: torch.Tensor) -> torch.Tensor:
    calls.append(float(x))
    return x.clone()


noted.register_fake(lambda x: torch.empty_like(x))


class Inplace(torch.autograd.Function):
    """Writes without a user in forward and backward; its gradient is not that of its forward."""

    @staticmethod
    def forward(ctx, x):
        h = torch.empty_like(x)
        h.copy_(x)
        h = h * 0
        h.add_(x)
        ctx.save_for_backward(x)
        return h * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        out = grad * 1
        out.masked_fill_(x < 0, 0.5)
        out.clamp_(max=1.5)
        return out


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))


class OwnFunction(Model):
    def forward(self, x):
        return Inplace.apply(self.linear(x))


class OwnFunctionInACheckpoint(OwnFunction):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Write(Model):
    def forward(self, x):
        self.seen.add_(x.sum(0))
        return self.linear(x)


class WriteOfAList(Model):
    def forward(self, x):
        torch._foreach_add_([self.seen, self.variance], 1.0)
        return self.linear(x) * self.seen


class WriteToAnArgument(Model):
    def forward(self, x):
        torch.add(self.seen, 1.0, out=self.variance)
        return self.linear(x)


class WriteThroughAView(Model):
    def forward(self, x):
        self.seen.view(2, 4)[0].fill_(3.0)
        return self.linear(x) * self.seen


class WriteInACheckpoint(Model):
    """Nothing uses what the checkpoint returns."""

    def forward(self, x):
        def body(x):
            self.seen.add_(x.detach().sum(0))
            return x * 2

        checkpoint(body, x, use_reentrant=False)
        return self.linear(x)


class RunningStatistics(Model):
    """The schema of batch_norm declares no write."""

    def forward(self, x):
        F.batch_norm(x, self.seen, self.variance, training=True)
        return self.linear(x)


class WriteToWhatDropoutReturned(Model):
    """Dropout in evaluation returns its argument, which its schema does not say."""

    def forward(self, x):
        h = self.linear(x)
        y = F.dropout(h, 0.5, False)
        y.mul_(3.0)
        return h + y


class Random(Model):
    def forward(self, x):
        torch.rand(5)
        F.dropout(x, 0.5)
        return F.dropout(self.linear(x), 0.5)


class OwnOperator(Model):
    """Its schema declares nothing, and its owner counts calls."""

    def forward(self, x):
        torch.ops.sptc_test.noted(x.detach().sum())
        return self.linear(x)


PROGRAMS = [
    *(OwnFunction, OwnFunctionInACheckpoint, Write, WriteOfAList, WriteToAnArgument, WriteThroughAView, WriteInACheckpoint),
    *(RunningStatistics, WriteToWhatDropoutReturned, Random),
]


def as_written(gm, example_inputs):
    """Every pass of ours, then the graph as it stands: AOTAutograd has faults of its own with dead random draws and dropout's result."""
    return compile_graph(gm, example_inputs, Config(), inner=lambda g, inputs, _: g.forward)


def _trained(model, call, x):
    torch.manual_seed(1)
    out = call(x)
    out.square().sum().backward()
    return out.detach(), torch.rand(3), dict(model.named_buffers()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_equals_eager(program):
    torch.manual_seed(0)
    model = program()
    twin, x = copy.deepcopy(model), torch.randn(4, 8)
    *want, want_grads = _trained(model, model, x)
    *got, got_grads = _trained(twin, torch.compile(twin, backend=as_written, fullgraph=True), x)
    torch.testing.assert_close(got, want)
    assert_gradients_close(got_grads, want_grads)


def test_captured_bodies_are_left_alone():
    before, after = [], []

    def backend(gm, example_inputs):
        before.extend(body.code for body in gm.modules() if isinstance(body, torch.fx.GraphModule))
        from sptc.passes.normalize.lower import normalize

        normalize(gm, example_inputs)
        after.extend(body.code for body in gm.modules() if isinstance(body, torch.fx.GraphModule))
        return gm.forward

    torch.compile(OwnFunctionInACheckpoint(), backend=backend)(torch.randn(4, 8))
    assert len(before) > 2 and after == before


def test_an_operator_of_the_user_runs_though_nothing_uses_it():
    model = Model()

    def program(x):
        torch.ops.sptc_test.noted(x.sum())
        return model.linear(x)

    calls.clear()
    torch.compile(program, backend=as_written)(torch.ones(2, 8))
    assert calls == [16.0]


def test_asserts_and_prints_stay(capfd):
    def program(x):
        torch._higher_order_ops.print("rows: {}", x.shape[0])
        torch._assert_async(x.sum() > 0, "must be positive")
        n = x.sum().item()
        torch._check(n < 100)
        return x * 2

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(program, backend=as_written, fullgraph=True)
        compiled(torch.ones(2, 8))
        assert "rows: 2" in capfd.readouterr().out
        with pytest.raises(RuntimeError, match="must be positive"):
            compiled(-torch.ones(2, 8))
        with pytest.raises(RuntimeError, match="Runtime assertion failed"):
            compiled(100 * torch.ones(2, 8))


@pytest.fixture
def process_group():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_collectives_stay(process_group):
    """Every rank must issue each collective, whether or not this one uses the result."""

    def program(x):
        funcol.all_reduce(x.sum(), "sum", dist.group.WORLD)
        return x * 2

    ((gm, _),) = capture(program, {"x": torch.ones(2, 8)})
    names = {op(n).split(".")[1] for n in gm.graph.nodes if op(n).startswith("_c10d_functional")}
    assert "all_reduce" in names


def test_dead_values_go():
    def program(x):
        torch.softmax(x, -1).mean()
        return x * x.shape[0]

    ((gm, _),) = capture(program, {"x": torch.ones(2, 8)}, dynamic=True)
    assert {op(n) for n in gm.graph.nodes} == {"", "aten.mul.Tensor"}


@triton.jit
def add_one(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1, mask=i < n)


class KernelOnTheInput(nn.Module):
    """An FFN whose input a Triton kernel changes under it, and a kernel whose output nothing uses."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        unused = x * 2
        torch.library.wrap_triton(add_one)[(1,)](unused, unused.numel(), BLOCK=64)
        x = x + 1
        hidden = F.gelu(self.up(x))
        torch.library.wrap_triton(add_one)[(1,)](x.view(-1), x.numel(), BLOCK=64)
        return self.down(hidden)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_triton_kernels_stay_and_are_seen_to_write(monkeypatch, dynamic):
    """Without a device they can't run, but Dynamo captures them when told that there is one."""
    from sptc.passes.find.ffn import find_ffn
    from sptc.passes.normalize.lower import normalize

    graphs = []

    def backend(gm, example_inputs):
        graphs.append(normalize(gm, example_inputs))
        return lambda *args: [torch.zeros(4, 8)]

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    torch.compile(KernelOnTheInput(), backend=backend, fullgraph=True, dynamic=dynamic)(torch.randn(4, 8))
    (gm,) = graphs
    kernels = [n for n in gm.graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_mutation]
    assert [[op(n) for n in written_by(k)] for k in kernels] == [["aten.mul.Tensor"], ["aten.view.default"]]
    found = find_ffn(gm)
    assert not found.regions and [r.rule for r in found.refusals] == ["mutated"]


def test_a_checkpoint_writes_what_its_body_writes():
    buffer, other = torch.zeros(8), torch.ones(8)

    def program(x):
        def body(x):
            buffer.view(2, 4).add_(1.0)
            return x.view(-1), x * other

        return checkpoint(body, x, use_reentrant=False)

    ((gm, inputs),) = capture(program, {"x": torch.ones(2, 8)})
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
    by_input = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    assert [by_input[n] is buffer for n in written_by(call)] == [True]
    sets = alias_sets(gm.graph)
    assert {i for i, n in enumerate(by_input) if sets[n] == sets[call]} == {[*by_input.values()].index(inputs[0])}


@pytest.mark.parametrize(
    ("method", "writes"),
    [(lambda h: h.add_(1), True), (lambda h: F.relu(h, True), True), (lambda h: h.__setitem__(0, 1.0), True), (lambda h: h + 1, False)],
    ids=["method", "inplace-argument", "assignment", "none"],
)
def test_own_functions_write_what_they_are_given_if_they_write_at_all(method, writes):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            h = x * 2
            method(h)
            return h

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    ((gm, _),) = capture(lambda x: Function.apply(x), {"x": torch.ones(2, 8, requires_grad=True)})
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.autograd_function_apply)
    assert bool(written_by(call)) is writes and has_effects(call)
