"""What `torch.compile(model)` returns is no model for a Trainer: it would train, and save an empty adapter without a word."""

from __future__ import annotations

import sys
from types import FrameType

from torch._dynamo.eval_frame import OptimizedModule

from sptc.config import ConfigError


def refuse_wrapped_model() -> None:
    """To be called as a graph is compiled, hence before the first step.

    transformers' Trainer saves what `state_dict()` of its model names. Names of a wrapped one begin with "_orig_mod.": PEFT finds none of
    its own among them, and a whole model is loaded with new weights. Evaluation finds no labels either.

    Raises:
        ConfigError: a Trainer is at work and its model is what `torch.compile` returned.
    """
    transformers = sys.modules.get("transformers.trainer")
    frame: FrameType | None = sys._getframe() if transformers is not None else None
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, transformers.Trainer):  # type: ignore[union-attr]
            if isinstance(trainer.model, OptimizedModule):
                raise ConfigError(
                    f"{type(trainer).__name__} can't save a model that torch.compile wrapped: an adapter's file would be empty. Compile it "
                    'in place: model.compile(backend="spt", options=...) instead of model = torch.compile(model, backend="spt", options=...)'
                )
            return
        frame = frame.f_back
