"""A padded batch, and what a report says of the rows that FFNs compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sptc

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
