"""Models to prepare, a backend that runs their regions sparse, and what of their state tests look at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from sptc.backend import compile_graph
from sptc.config import Config
from sptc.paper.state import owners
from tests.models.zoo import CASES

OPTIONS = {
    "decline": "never",
    "ffn.selector": "router",
    "attention.selector": "pq",
    "attention.density": 0.5,
    "attention.query_block": 4,
    "attention.key_block": 4,
}
D, HIDDEN, HEADS = 16, 64, 2


class Compiled:
    """The spt backend without Inductor, and what it was called with."""

    def __init__(self, **options):
        self.config = Config.from_options({**OPTIONS, **options})
        self.reports = []

    def __call__(self, gm, example_inputs):
        graph = compile_graph(gm, example_inputs, self.config, lambda g, inputs, _: aot_autograd(fw_compiler=lambda m, _: m)(g, inputs))
        self.reports.append(graph.report)
        return graph


def slots(model):
    """All slots by their full name."""
    return {f"{name}.{key}": slot for name, owner in owners(model) for key, slot in owner.spt.slots().items()}


def rewritten(report):
    return [r for r in report.regions if r.status == "rewritten" and r.kind != "loss"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        heads = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2))


class Ffn(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.ffn = Attention(), Ffn()
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.ffn(self.norm(x))


class Model(nn.Module):
    """Layers with a pause (a graph break, or nothing) between them, dropout, and a buffer that counts calls."""

    def __init__(self, layers=2, pause=lambda: None):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.register_buffer("calls", torch.zeros(()))
        self.pause = pause

    def forward(self, x):
        self.calls.add_(1)
        for layer in self.layers:
            x = F.dropout(layer(x), 0.1, self.training)
            self.pause()
        return x


def batch(length=12, seed=0):
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(seed))


def make(name, checkpointed):
    case = CASES[name]
    model, inputs = case.make()
    if checkpointed:
        model.gradient_checkpointing_enable()
    return case, model, inputs


def adapted(base, **more):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(r=2, target_modules=["qkv", "up", "down"], **more))


def randomised(model):
    with torch.no_grad():
        for slot in slots(model).values():
            for tensor in slot.tensors():
                tensor.add_(torch.rand_like(tensor))
    return {name: [t.clone() for t in slot.tensors()] for name, slot in slots(model).items()}
