"""The ways to fine-tune that are compared: dense, and sparse with some options of the backend."""

from __future__ import annotations

import json
import re
from typing import Any

from sptc.config import Config

Options = dict[str, Any] | None  # of sptc.prepare and torch.compile(backend="spt"); None: dense

DENSE = "dense"
EQUAL_SPEED = "equal-speed"  # as the option "plan", no file: a plan made for the run, predicted to be as fast as the densities beside it

# Each against `dense`, alone before together.
_ATTENTION: dict[str, Any] = {"ffn.enabled": False, "attention.density": 0.125}
_PAPER: dict[str, Any] = {"attention.density": 0.125, "ffn.selector": "router", "ffn.density": 0.5}
_FFN: dict[str, Any] = {**_PAPER, "attention.enabled": False}
VARIANTS: dict[str, Options] = {
    DENSE: None,
    "default": {},
    "units": {"attention.enabled": False, "max_rise": 0.02},  # of FFNs, as measured; four times what the default allows
    "units-1/2": {"attention.enabled": False, "ffn.density": 0.5, "ffn.context_density": None},
    "context-1/4": {"attention.enabled": False, "ffn.context_density": 0.25},
    "gradients": {"attention.enabled": False, "max_rise": 0.0, "ffn.gradient_context_density": 0.125},  # forward exact
    "paper": _PAPER,
    "attention": _ATTENTION,
    "ffn": _FFN,
    "attention-pq": {**_ATTENTION, "attention.selector": "pq"},
    # The paper's rule.
    "attention-pq-keys": {**_ATTENTION, "attention.selector": "pq", "attention.query_block": 1, "attention.key_block": 1},
    "attention-16x8": {**_ATTENTION, "attention.query_block": 16, "attention.key_block": 8},
    "attention-8x8": {**_ATTENTION, "attention.query_block": 8, "attention.key_block": 8},
    "attention-1/4": {**_ATTENTION, "attention.density": 0.25},
    "attention-1/16": {**_ATTENTION, "attention.density": 0.0625},
    "ffn-1/4": {**_FFN, "ffn.density": 0.25},
    "ffn-3/4": {**_FFN, "ffn.density": 0.75},
    "ffn-4-blocks": {**_FFN, "ffn.blocks": 4},
    "ffn-8-blocks": {**_FFN, "ffn.blocks": 8},
    "ffn-32-blocks": {**_FFN, "ffn.blocks": 32},
    "no-keep": {**_PAPER, "ffn.keep": None},
    "three-quarters": {**_PAPER, "ffn.density": 0.75},
    "8-blocks": {**_PAPER, "ffn.blocks": 8},
    "planned": {**_PAPER, "plan": EQUAL_SPEED},
}


def variant(text: str) -> tuple[str, Options]:
    """The name and options of a variant on the command line: a name of the table, or name='{"option": value}'.

    Nothing is declined, so that a variant's densities are what was run, whatever pays on this machine.

    Raises:
        ValueError: an unknown name, a name that can't be part of a file's, options that are no JSON object.
        ConfigError: an option that the backend does not know or take.
    """
    name, given, options = text.partition("=")
    if not given:
        if name not in VARIANTS:
            raise ValueError(f"no variant {name!r}; known are {', '.join(VARIANTS)}, or give options: {name}='{{\"ffn.density\": 0.25}}'")
        chosen = VARIANTS[name]
    else:
        if name in VARIANTS or not re.fullmatch(r"[\w.-][\w./-]*", name):
            raise ValueError(f"{name!r} can't name a new variant: it is taken, or holds other than letters, digits, . / _ and -")
        chosen = json.loads(options)
        if not isinstance(chosen, dict):
            raise ValueError(f"the options of {name!r} must be a JSON object, got {options}")
    if chosen is None:
        return name, None
    return name, Config.from_options({"decline": "never", **chosen}).to_options()
