"""Options of `torch.compile(model, backend="spt", options={...})`: one frozen dataclass, flat dotted keys."""

from __future__ import annotations

import difflib
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from sptc.ir.errors import SptcError


class ConfigError(SptcError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


def _option(key: str, default: Any, doc: str) -> Any:
    metadata = {"key": key, "doc": doc}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every option with its default. `Config.from_options({"ffn.density": 0.5})` validates; attributes use underscores."""

    attention_enabled: bool = _option("attention.enabled", True, "rewrite attention regions")
    attention_density: float | Literal["auto"] = _option(
        "attention.density", "auto", "share of keys kept, in (0, 1]; 'auto': measured on the first batch (selector 'pq': 1/8)"
    )
    attention_query_block: int | None = _option("attention.query_block", None, "queries a tile; None: from shapes and device")
    attention_key_block: int | None = _option("attention.key_block", None, "keys a block; None: from shapes and device")
    attention_selector: Literal["pq", "pooled"] = _option("attention.selector", "pooled", "how blocks of keys are chosen")
    ffn_enabled: bool = _option("ffn.enabled", True, "rewrite FFN regions")
    ffn_selector: Literal["energy", "router"] = _option(
        "ffn.selector",
        "energy",
        "'energy': single hidden units, one set for many tokens; 'router': blocks of units for each token (the paper's)",
    )
    ffn_density: float | Literal["auto"] = _option(
        "ffn.density", "auto", "share of hidden units kept, in (0, 1]; 'auto': measured on the first batch (selector 'router': 1/2)"
    )
    ffn_context_density: float | Literal["auto"] | None = _option(
        "ffn.context_density",
        "auto",
        "selector 'energy': the share for tokens whose label does not count; None: as for all. A number for ffn.density is for all, too, "
        "unless this is given",
    )
    ffn_left_out: Literal["nothing", "linear"] = _option(
        "ffn.left_out",
        "nothing",
        "selector 'energy': what hidden units that are left out contribute: 'nothing', or 'linear', what is linear in the FFN's input, "
        "fitted to a sample of the tokens each time",
    )
    ffn_gradient_density: float = _option(
        "ffn.gradient_density",
        1.0,
        "where the forward pass keeps all hidden units: the share that gradients go through, in (0, 1]",
    )
    ffn_gradient_context_density: float | None = _option(
        "ffn.gradient_context_density", None, "the same for tokens whose label does not count; None: as for all"
    )
    ffn_padding: Literal["skip", "compute"] = _option(
        "ffn.padding",
        "skip",
        "with gradients, tokens whose FFN output nothing reads: padding; 'skip' is exact but for what is returned of padding itself",
    )
    ffn_recompute: bool | None = _option(
        "ffn.recompute",
        None,
        "selector 'energy': backward computes hidden values again, which then take no memory: a few percent slower; None: where objective "
        "'memory' or a plan asks for it",
    )
    ffn_chunk: int | None = _option(
        "ffn.chunk",
        None,
        "where hidden values are computed again: for how many tokens at a time, so that those of all are never in memory; 0: all at once; "
        "None: as many as products want with objective 'memory', else all",
    )
    ffn_blocks: int = _option("ffn.blocks", 16, "selector 'router': blocks of hidden units")
    ffn_keep: Literal["loss"] | None = _option(
        "ffn.keep", "loss", "selector 'router': with 'loss', tokens whose label counts get more blocks, of the same total"
    )
    max_rise: float = _option("max_rise", 0.005, "of densities 'auto': how much the loss may rise before training, relative, at least 0")
    loss_enabled: bool = _option("loss.enabled", True, "rewrite losses: only labels that count cost anything, and no logits are kept")
    loss_logits: Literal["defer", "keep", "drop"] = _option(
        "loss.logits",
        "defer",
        "logits that a graph with gradients returns beside its loss: 'defer' computes them once something uses them, 'keep' in every step, "
        "'drop' returns a tensor that raises",
    )
    inference: Literal["dense", "sparse"] = _option(
        "inference", "dense", "graphs without gradients; with trained routers or codebooks they are sparse unless this is given"
    )
    exclude: list[str] | None = _option(
        "exclude", None, "modules to leave alone: patterns of their names; trained heads are left alone too, unless it is []"
    )
    objective: Literal["time", "memory"] = _option(
        "objective",
        "time",
        "'memory': regions are rewritten where they keep less for backward, hidden values of FFNs and whatever else is cheap are computed "
        "again, at the cost of some time",
    )
    plan: str | dict[str, Any] | None = _option(
        "plan", None, "what sptc.plan gave, or a file that its save wrote: a density for each region, in place of the two above"
    )
    decline: Literal["auto", "never"] = _option("decline", "auto", "leave a region dense where sparse would not be faster")
    on_error: Literal["raise", "dense"] | None = _option(
        "on_error", None, "None: what can't be traced again stays dense, with a warning, and a bug raises; 'raise': both; 'dense': neither"
    )
    disable: list[str] | None = _option(
        "disable", None, "passes to leave out, to find one that is at fault: lower, find, bind, decide, rewrite"
    )
    dump: str | None = _option("dump", None, "a folder for graphs, kernels and the report")
    inductor: dict[str, Any] = _option("inductor", {}, "config patches for Inductor")
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)  # keys that from_options was given; no option itself

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Config:
        """Validate `options` and return a Config.

        Raises:
            ConfigError: unknown key (the nearest known one is named), wrong type, or value out of range.
        """
        if options is None:
            return cls()
        if isinstance(options, Config):
            return options
        if not isinstance(options, Mapping):
            raise ConfigError(f"options must be a dict of dotted keys, got {type(options).__name__}")
        known = {f.metadata["key"]: f for f in _options()}
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, value in options.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise ConfigError(f"unknown option {key!r}; did you mean {near[0]!r}? Known: {', '.join(sorted(known))}")
            name = known[key].name
            values[name] = _checked(key, _written(value) if key == "plan" else value, hints[name])
        config = cls(**values, given=frozenset(options))
        config._check_ranges()
        return config

    def to_options(self) -> dict[str, Any]:
        """The inverse of from_options: the options that were given or differ from their defaults, dotted keys to values."""
        values = {f.metadata["key"]: (getattr(self, f.name), getattr(_DEFAULT, f.name)) for f in _options()}
        return {key: value for key, (value, default) in values.items() if key in self.given or value != default}

    @property
    def context_density(self) -> float | Literal["auto"] | None:
        """`ffn_context_density` as it holds: who gives a number for `ffn.density` and nothing for the context means all tokens."""
        if self.ffn_context_density == "auto" and self.ffn_density != "auto" and "ffn.context_density" not in self.given:
            return None
        return self.ffn_context_density

    @property
    def recomputes(self) -> bool:
        """Whether backward computes hidden values of FFNs again."""
        return self.objective == "memory" if self.ffn_recompute is None else self.ffn_recompute

    def _check_ranges(self) -> None:
        for pattern in self.exclude or ():
            if not isinstance(pattern, str):
                raise ConfigError(f"option 'exclude' must hold patterns of module names, got {pattern!r} ({type(pattern).__name__})")
        densities = {
            "attention.density": self.attention_density,
            "ffn.density": self.ffn_density,
            "ffn.context_density": self.ffn_context_density,
            "ffn.gradient_density": self.ffn_gradient_density,
            "ffn.gradient_context_density": self.ffn_gradient_context_density,
        }
        for key, value in densities.items():
            if isinstance(value, float) and not 0.0 < value <= 1.0:
                raise ConfigError(f"option {key!r} must be in (0, 1], got {value}")
        thinned = [f.metadata["key"] for f in _options() if f.name.startswith("ffn_gradient") and getattr(self, f.name) not in (1.0, None)]
        fixed = (
            self.ffn_selector == "router"
            or self.plan is not None
            or self.ffn_density != "auto"
            or self.ffn_context_density not in ("auto", None)
        )
        if thinned and fixed:
            raise ConfigError(
                f"option {thinned[0]!r} is for FFNs whose forward pass keeps all hidden units; leave out ffn.density, ffn.context_density, "
                "ffn.selector and plan, and set max_rise to 0 to keep all of them so"
            )
        if not 0.0 <= self.max_rise < float("inf"):
            raise ConfigError(f"option 'max_rise' must be a number of at least 0, got {self.max_rise}")
        if self.ffn_chunk is not None and self.ffn_chunk < 0:
            raise ConfigError(f"option 'ffn.chunk' must be a number of tokens, or 0 for all at once, got {self.ffn_chunk}")
        for key, size in (
            ("attention.query_block", self.attention_query_block),
            ("attention.key_block", self.attention_key_block),
            ("ffn.blocks", self.ffn_blocks),
        ):
            if size is not None and size < 1:
                raise ConfigError(f"option {key!r} must be at least 1, got {size}")


def _written(plan: Any) -> Any:
    """A plan as plain data, of which scripts and processes of their own can be given options; a path as a string."""
    from sptc.ir.plan import Plan  # which is applied to a Config

    if isinstance(plan, Plan):
        return plan.to_dict()
    return os.fspath(plan) if isinstance(plan, os.PathLike) else plan


def _options() -> list[Field[Any]]:
    return [f for f in fields(Config) if "key" in f.metadata]


_DEFAULT = Config()


def _checked(key: str, value: Any, hint: Any) -> Any:
    """`value` if it fits `hint` (an int fits float; a bool is no number), else a ConfigError that says what fits."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    plain = tuple(typing.get_origin(kind) or kind for kind in kinds if typing.get_origin(kind) is not Literal)
    if isinstance(value, str) and value in words:
        return value
    if not isinstance(value, bool) or bool in plain:
        if isinstance(value, plain):
            return value
        if float in plain and isinstance(value, int):
            return float(value)
    names = [*({float: "a number", type(None): "None"}.get(kind, kind.__name__) for kind in plain), *map(repr, words)]
    fits = " or ".join(names) if plain else f"one of {', '.join(names)}"
    raise ConfigError(f"option {key!r} must be {fits}, got {reprlib.repr(value)} ({type(value).__name__})")
