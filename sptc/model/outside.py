"""What of a model no captured graph holds, as far as its parameters tell."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

_NAMED = 6  # modules that a note lists


def outside_note(model: nn.Module, read: Collection[int]) -> str | None:
    """A note on the modules whose parameters no graph reads; None if there are none.

    Args:
        model: what was captured or compiled.
        read: `id` of every parameter that is an input of a graph.
    """
    if not any(id(p) in read for p in model.parameters()):
        if not any(True for _ in model.parameters()):
            return None
        return "no graph reads a parameter of the model: its layers run eagerly, or graphs are given their weights as other tensors"
    names = list(_outside(model, "", read))
    if not names:
        return None
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"in no graph: {', '.join(names[:_NAMED])}{more}; no graph reads their parameters, they run eagerly or not at all"


def _outside(module: nn.Module, name: str, read: Collection[int]) -> Iterator[str]:
    parameters = list(module.parameters())
    if not parameters or all(id(p) in read for p in parameters):
        return
    if name and not any(id(p) in read for p in parameters):
        yield name
        return
    prefix = f"{name}." if name else ""
    yield from (prefix + local for local, p in module.named_parameters(recurse=False) if id(p) not in read)
    for local, child in module.named_children():
        yield from _outside(child, prefix + local, read)
