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
    module = sys.modules.get("transformers.trainer")
    frame: FrameType | None = sys._getframe() if module is not None else None
    # Only frames of Trainer's own are looked into: a frame that was asked for its locals keeps what they were.
    while frame is not None and frame.f_code.co_filename != module.__file__:  # type: ignore[union-attr]
        frame = frame.f_back
    trainer = None if frame is None else frame.f_locals.get("self")
    if isinstance(getattr(trainer, "model", None), OptimizedModule):
        raise ConfigError(
            f"{type(trainer).__name__} can't save a model that torch.compile wrapped: an adapter's file would be empty. Compile it in "
            'place: model.compile(backend="spt", options=...), not model = torch.compile(model, backend="spt", options=...)'
        )
