"""Compile models through every pass, with AOTAutograd instead of Inductor: seconds instead of minutes, and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from sptc.backend import compile_graph
from sptc.config import Config

_aot = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward), keep_inference_input_mutations=True)  # as Inductor does

FULL = {
    "decline": "never",
    "attention.density": 1.0,
    "ffn.density": 1.0,
    "ffn.context_density": None,
    "attention.query_block": 4,
    "attention.key_block": 4,
}


def without_inductor(**options: Any) -> Callable[..., Any]:
    """A Dynamo backend: sptc with `options`, then AOTAutograd that runs its graphs as they are."""
    config = Config.from_options(options)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, config, inner=lambda g, inputs, _: _aot(g, inputs))

    return backend


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss by parameter name; those without one are left out."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """|got - want| <= tolerance * max(largest of the parameter, 1e-2 of the model's largest), for every parameter by name."""
    assert got.keys() == want.keys()
    largest = max(float(g.abs().max()) for g in want.values())
    worst = {
        name: float((got[name].double() - g.double()).abs().max()) / max(float(g.abs().max()), 1e-2 * largest) for name, g in want.items()
    }
    wrong = {name: error for name, error in worst.items() if not error <= tolerance}
    assert not wrong, f"relative errors beyond {tolerance}: {wrong}"
