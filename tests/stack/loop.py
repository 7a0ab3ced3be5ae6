"""A training loop as people write it, on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.stack.matrix import Run
from tests.stack.models import batch


def loop(
    run: Run,
    model: Any,
    call: Callable[..., Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    steps: int = 5,
    make_optimizer: Callable[[list[Any]], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
) -> None:
    """Train `model` on `inputs`.

    Args:
        call: what computes the output, if not `model` itself.
    """
    call = model if call is None else call
    inputs = batch() if inputs is None else inputs
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        loss = call(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
