"""Models with one FFN in the spellings that are rewritten, a loss over some tokens, and adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

D, HIDDEN, CLASSES = 12, 32, 5


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN, bias=False), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Fused(nn.Module):
    """Gate and up are halves of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * HIDDEN), nn.Linear(HIDDEN, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, -1)
        return self.down(up * F.gelu(gate))


class Plain(nn.Module):
    """In-place activation, views between, weights stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(HIDDEN, D), Conv1D(D, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x), inplace=True).view(x.shape[0], -1, HIDDEN))


class Model(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.first, self.ffn, self.head = nn.Linear(D, D), ffn, nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.first(x)
        return F.cross_entropy(self.head(x + self.ffn(x)).flatten(0, 1), labels.flatten())


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (2, n), generator=generator)
    labels[0, 2:] = labels[1, ::2] = -100
    return torch.randn(2, n, D, generator=generator), labels


def model_of(ffn: Callable[[], nn.Module], adapted: bool, rank: int = 4) -> Model:
    torch.manual_seed(0)
    model = Model(ffn())
    if adapted:
        for name, layer in list(model.ffn.named_children()):
            conv = isinstance(layer, Conv1D)
            setattr(model.ffn, name, LoraLinear(layer, "default", LoraConfig(fan_in_fan_out=conv), r=rank, lora_alpha=6))
        with torch.no_grad():
            for name, p in model.ffn.named_parameters():
                p.requires_grad_("lora" in name)
                if "lora" in name:
                    p.copy_(0.5 * torch.randn_like(p))
    return model


def hidden_and_output(ffn: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the down projection is given, and the down projection."""
    seen = []
    handle = ffn.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ffn(x[None])
    handle.remove()
    return seen[0][0], ffn.down
