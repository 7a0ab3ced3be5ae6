"""An objective as it would be served: its saved adapter in the plain model, loaded by PEFT alone."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from torch import nn

from bench.quality.tasks import Task


def served(task: Task, objective: nn.Module) -> nn.Module:
    """A new objective of the task, in eval mode, with the adapter that `objective` saves and the values of what it trains beside adapters.

    The adapter goes through files, its config included: what the files do not hold is lost, as it is for whoever serves it. What a
    prepared model saves beside the adapter finds no module here, and PEFT leaves it out.
    """
    with torch.random.fork_rng(), torch.no_grad():  # an adapter starts from random numbers before its own are loaded
        plain = _plain(task, objective)
    return plain.eval()


def _plain(task: Task, objective: nn.Module) -> nn.Module:
    plain = task.objective()
    for name, module in list(plain.named_modules()):
        if isinstance(module, PeftModel):
            with TemporaryDirectory() as folder:
                objective.get_submodule(name).save_pretrained(folder, save_embedding_layers=False)
                plain.set_submodule(name, PeftModel.from_pretrained(module.unload(), folder))
    trained = dict(objective.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:  # a loaded adapter does not
            parameter.copy_(trained[name])
    return plain
