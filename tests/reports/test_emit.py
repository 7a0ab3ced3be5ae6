"""Which kernels a compile emits, before any of them runs."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sptc.backend import captured_unit
from sptc.codegen.triton.run.launch import Launch
from sptc.codegen.triton.target import KNOWN, Target, targeting
from sptc.config import Config
from sptc.model.capture import capture
from sptc.passes import PIPELINE
from sptc.passes.runner import run
from sptc.reports import emit as emit_module
from sptc.reports.emit import EmittedKernel, emit
from tests.models.compiled import FULL, without_inductor
from tests.models.zoo import CASES

CPU = torch.device("cpu")
OPTIONS = {**FULL, "inference": "sparse"}


class Attention(nn.Module):
    """x [n, 16]: one head, each row attends to those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[None, None] for layer in (self.q, self.k, self.v))
        return scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0]


class HalfInside(Attention):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = super().forward(x)
        return y.float()


def emitted(model, inputs, device: torch.device = CPU) -> tuple[EmittedKernel, ...]:
    found: list[EmittedKernel] = []

    def on_graph(gm, example):
        found.extend(emit(run(captured_unit(gm, example, Config.from_options(OPTIONS)), PIPELINE), device))

    capture(model, inputs, on_graph)
    return tuple(found)


def templates(kernels) -> set[str]:
    return {kernel.spec.template for kernel in kernels}


def precisions(kernels) -> set[str]:
    return {value for kernel in kernels for name, value in kernel.spec.constants if name == "PRECISION"}


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_a_device_without_kernels_gets_none():
    assert emitted(Attention(), torch.randn(5, 16)) == ()


def test_regions_share_kernels_and_their_headers_name_both(interpreter):
    model, inputs = CASES["opt-sdpa"].make()
    kernels = emitted(model, inputs)
    assert len({kernel.spec for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        lines = [line for line in kernel.source.splitlines() if line.startswith("# for ")]
        assert lines == [f"# for {origin}" for origin in kernel.origins]
        assert len(lines) == 2 and "layers.0" in lines[0] and "layers.1" in lines[1]
    assert "attention_backward_kv" in templates(kernels)


def test_nothing_is_emitted_for_gradients_that_nobody_asks_for(interpreter):
    model, x = Attention(), torch.randn(9, 16)
    backward = {"attention_backward_q", "attention_backward_kv"}
    assert backward <= templates(emitted(model, x))
    model.requires_grad_(False)
    forward = templates(emitted(model, x))
    assert "attention_forward" in forward and not backward & forward
    assert backward <= templates(emitted(model, x.clone().requires_grad_()))
    model.q.requires_grad_(True)
    assert backward & templates(emitted(model, x)) == {"attention_backward_q"}
    with torch.no_grad():
        assert not backward & templates(emitted(model, x))


def test_kernels_are_for_the_dtype_that_autocast_makes(interpreter):
    x = torch.randn(5, 16)
    assert precisions(emitted(Attention(), x)) == {"tf32x3"}
    assert precisions(emitted(HalfInside(), x)) == {"tf32"}
    with torch.autocast("cpu", torch.bfloat16):
        assert precisions(emitted(Attention(), x)) == {"tf32"}


def test_a_gpu_gets_its_kernels_compiled_before_the_first_step(monkeypatch):
    """All that the graph launches, in the signatures that it launches them with; a CPU compiles nothing ahead."""
    asked: list[tuple[list[Launch], Target]] = []
    monkeypatch.setattr(emit_module, "precompile", lambda launches, target: asked.append((launches, target)))
    model, x = Attention(), torch.randn(9, 16)
    with targeting(KNOWN["sm_90"]):
        kernels = emitted(model, x, torch.device("cuda"))
    [(launches, target)] = asked
    assert target == KNOWN["sm_90"] and {launch.spec for launch in launches} == {kernel.spec for kernel in kernels}
    assert {"attention_forward", "attention_backward_q", "attention_backward_kv"} <= {launch.spec.template for launch in launches}
    assert all(value.is_meta for launch in launches for value in launch.arguments.values() if isinstance(value, Tensor))
    emitted(model, x)
    assert len(asked) == 1


def test_emitting_adds_no_guard(interpreter):
    model, seen = Attention(), []

    def backend(gm, inputs):
        seen.append(gm)
        without_inductor(**OPTIONS)(gm, inputs)
        return gm.forward

    compiled = torch.compile(model, backend=backend, dynamic=True)
    for n in (5, 8, 16, 128, 513):
        compiled(torch.randn(n, 16))
    assert len(seen) <= 2, "TorchDynamo starts a dynamic capture anew once"


def test_double_precision_has_no_kernels(interpreter):
    assert emitted(Attention(), torch.randn(5, 16)) and not emitted(Attention().double(), torch.randn(5, 16, dtype=torch.float64))
