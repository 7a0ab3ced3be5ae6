"""A model whose loss tells how much its FFNs may leave out, and batches for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HIDDEN, CLASSES = 16, 64, 7


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Mixer(nn.Module):
    """Tokens see those before them, so that the context matters."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Model(nn.Module):
    """Two FFNs; the second one adds next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(50, D), nn.Linear(D, CLASSES)
        self.ffns, self.mixer = nn.ModuleList([Ffn(), Ffn()]), Mixer()
        with torch.no_grad():
            self.ffns[0].down.weight *= 10
            self.ffns[1].down.weight *= 0.01

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for ffn in self.ffns:
            x = x + ffn(x)
            x = x + self.mixer(x)
        return self.head(x)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(ids).flatten(0, 1), labels.flatten())


def batch(length: int = 12, counted: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids, labels = (torch.randint(high, (3, length), generator=generator) for high in (50, CLASSES))
    labels[:, : round(length * (1 - counted))] = -100
    return ids, labels
