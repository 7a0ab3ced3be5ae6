"""What a refusal calls a value: what its user knows of it, never the name of a node that only the graph has."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import sptc


class Gated(nn.Module):
    """Its FFN is none that is read: `how` says why."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.slope = nn.Parameter(torch.ones(64))
        self.how = how

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        hidden = silu(self.up(x))
        if self.how == "parameter":
            hidden = silu(self.up(x) * self.slope)
        if self.how == "input":
            hidden = hidden * gate
        if self.how == "operator":
            hidden = hidden.cumsum(-1)
        return x + self.down(hidden)


class Layers(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Gated(how)}) for _ in range(2))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["mlp"](x, gate)
        return x


SAYS = {
    "parameter": r"^mlp\.slope gives each hidden unit a parameter of its own",
    "input": r"^gate enters the activation",
    "operator": r"^cumsum of mlp at test_site\.py:\d+ ",
}


@pytest.mark.parametrize("how", SAYS)
def test_a_refusal_names_what_the_user_wrote(how: str) -> None:
    """It said `arg13_1` or `linear_18`; and layers of one kind say the same, so that the log counts them together."""
    report: Any = sptc.explain(Layers(how), {"x": torch.randn(2, 8, 32), "gate": torch.randn(2, 8, 64)})
    first, second = ({r.reason for r in report.regions if r.kind == "ffn" and r.module == f"layers.{i}.mlp"} for i in range(2))
    assert first == second and any(re.search(SAYS[how], reason) for reason in first), first
