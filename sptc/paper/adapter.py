"""PEFT: makes the trainable state of a prepared PeftModel part of what its adapter trains, saves and loads.

PEFT saves whole modules that a config names in `modules_to_save`; each is held by a ModulesToSaveWrapper with a copy for each adapter.
The submodules `spt` become such modules of the active adapter.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from sptc.ir.errors import SptcError
from sptc.paper.state import owners

NAME = "spt"


class AdapterError(SptcError, ValueError):
    """The adapter can't hold trainable state."""


def peft_models(model: nn.Module) -> list[Any]:
    """The PeftModels in `model`, itself included; none when PEFT is not in use."""
    peft = sys.modules.get("peft")
    return [] if peft is None else [module for module in model.modules() if isinstance(module, peft.PeftModel)]


def check(model: nn.Module) -> None:
    """Raises AdapterError when the active adapter of a PeftModel can't save modules."""
    for peft_model in peft_models(model):
        config = peft_model.peft_config[peft_model.active_adapter]
        if not hasattr(config, "modules_to_save"):
            raise AdapterError(
                f"a PEFT adapter of type {type(config).__name__} saves no modules, so trainable state would be lost; use LoRA"
            )


def adopt(model: nn.Module) -> None:
    """Hand the `spt` modules inside each PeftModel to its active adapter."""
    for peft_model in peft_models(model):
        from peft.utils import ModulesToSaveWrapper

        adapter = peft_model.active_adapter
        config = peft_model.peft_config[adapter]
        found = [owner for _, owner in owners(peft_model)]
        for owner in found:
            state: Any = owner.spt
            owner.spt = ModulesToSaveWrapper(state, adapter)
            owner.spt.set_adapter(adapter)  # a wrapper begins with a list of them, which `merge_and_unload` takes for a name
            owner.spt.modules_to_save[adapter].notice = state.notice  # the copy still shares it with the other owners
            owner.spt.modules_to_save[adapter].requires_grad_(not config.inference_mode)
        if found and NAME not in (config.modules_to_save or []):
            config.modules_to_save = [*(config.modules_to_save or []), NAME]


def release(model: nn.Module) -> None:
    """Undo what `adopt`, and PEFT when it loaded such an adapter, noted of the `spt` modules."""
    for peft_model in peft_models(model):
        for config in peft_model.peft_config.values():
            if NAME in (getattr(config, "modules_to_save", None) or []):
                config.modules_to_save = [name for name in config.modules_to_save if name != NAME] or None
        if NAME in (getattr(peft_model, "modules_to_save", None) or ()):
            peft_model.modules_to_save = {name for name in peft_model.modules_to_save if name != NAME} or None
