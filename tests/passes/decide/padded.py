"""A padded batch, and what a report says of the rows that FFNs compute."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import sptc
from tests.models.compiled import FULL, assert_gradients_close, gradients, without_inductor

LAYERS = 2  # of the models


def padded() -> dict[str, Tensor]:
    """Padding on either side, prompts without labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 8:] = mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :7] = labels[0, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(compiled: Any) -> list[str]:
    return [r.settings["rows"] for r in sptc.report(compiled).regions if r.kind == "ffn" and r.settings is not None]


def assert_small_as_dense(model: nn.Module, inputs: dict[str, Tensor], want: list[str], **options: Any) -> None:
    reference = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=without_inductor(**{**FULL, **options}))
    loss, expected = compiled(**inputs)[0], reference(**{**inputs, "x": inputs["x"].double()})[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_gradients_close(gradients(model, loss), gradients(reference, expected))
    assert (got := rows(compiled)) == want, got
    torch._dynamo.reset()
