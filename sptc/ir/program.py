"""A straight line of ATen operators as text, which travels in graphs as an op argument: a function that an op computes part by part.

The text is JSON, read and never evaluated as code: a list of calls and a list of results.

    {"calls": [["t.default", [["value", 1]], {}], ["mm.default", [["value", 0], ["value", 2]], {}]], "results": [3]}

Values are numbered: the inputs first, then what each call returns. An argument is a value as ["value", number], a list of arguments as
["list", ...], a dtype, layout, memory format or device as ["dtype", "float32"], ["layout", "strided"], ["memory_format",
"contiguous_format"], ["device", "cpu"], or a number, bool, string or None as it is. Operators are those of `torch.ops.aten`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Value:
    """The value of this number, in place of an argument."""

    number: int


@dataclass(frozen=True)
class Call:
    """One operator on values and constants."""

    name: str  # "mm.default"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def operator(self) -> Callable[..., Any]:
        packet, _, overload = self.name.partition(".")
        operator: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
        return operator


@dataclass(frozen=True)
class Program:
    """Calls in order; `results` are numbers of values."""

    calls: tuple[Call, ...]
    results: tuple[int, ...]

    def __str__(self) -> str:
        calls = [[c.name, [*map(_written, c.args)], {key: _written(value) for key, value in c.kwargs.items()}] for c in self.calls]
        return json.dumps({"calls": calls, "results": self.results}, separators=(",", ":"))


@lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """The program that `str` wrote."""
    read = json.loads(text)
    calls = (
        Call(name, tuple(map(_read, args)), {key: _read(value) for key, value in named.items()}) for name, args, named in read["calls"]
    )
    return Program(tuple(calls), tuple(read["results"]))


def _written(argument: Any) -> Any:
    if isinstance(argument, Value):
        return ["value", argument.number]
    if isinstance(argument, list | tuple):
        return ["list", *map(_written, argument)]
    if isinstance(argument, torch.dtype | torch.layout | torch.memory_format | torch.device):
        return [type(argument).__name__, str(argument).removeprefix("torch.")]
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    raise TypeError(f"a program can't hold {argument!r} ({type(argument).__name__})")


def _read(written: Any) -> Any:
    if not isinstance(written, list):
        return written
    kind, *rest = written
    if kind == "value":
        return Value(rest[0])
    if kind == "list":
        return [_read(item) for item in rest]
    return torch.device(rest[0]) if kind == "device" else getattr(torch, rest[0])


class Parts:
    """A program to be run for one part of its inputs after the other: what depends on none that differ is computed once, at the start."""

    def __init__(self, program: Program, parted: int, shared: Sequence[Any]) -> None:
        """`parted`: how many of the inputs, the first ones, each `run` is given; `shared`: the others."""
        numbered = list(enumerate(program.calls, parted + len(shared)))
        differs = set(range(parted))
        for number, call in numbered:
            if not differs.isdisjoint(_values(call)):
                differs.add(number)
        self._results = program.results
        self._each = [(number, call) for number, call in numbered if number in differs]
        values = dict(enumerate(shared, parted))
        for number, call in numbered:
            if number not in differs:
                values[number] = _called(call, values)
        read = set(self._results).union(*(_values(call) for _, call in self._each))
        self._shared = {number: value for number, value in values.items() if number in read}
        last = {value: number for number, call in self._each for value in _values(call)}
        self._done: dict[int, list[int]] = {}
        for value, number in last.items():
            if value in differs and value not in self._results:
                self._done.setdefault(number, []).append(value)

    def run(self, *part: Any) -> list[Any]:
        """The results for one part. What only it is computed from is freed on the way."""
        values = {**self._shared, **dict(enumerate(part))}
        for number, call in self._each:
            values[number] = _called(call, values)
            for value in self._done.get(number, ()):
                del values[value]
        return [values[number] for number in self._results]


def _values(call: Call) -> set[int]:
    """Numbers of the values that a call reads."""
    found: set[int] = set()
    pending: list[Any] = [*call.args, *call.kwargs.values()]
    while pending:
        argument = pending.pop()
        if isinstance(argument, Value):
            found.add(argument.number)
        elif isinstance(argument, list):
            pending += argument
    return found


def _called(call: Call, values: Mapping[int, Any]) -> Any:
    return call.operator(*_filled(call.args, values), **{key: _filled(value, values) for key, value in call.kwargs.items()})


def _filled(argument: Any, values: Mapping[int, Any]) -> Any:
    """No closure that calls itself, which would keep all values alive until garbage is collected."""
    if isinstance(argument, Value):
        return values[argument.number]
    return [_filled(item, values) for item in argument] if isinstance(argument, list | tuple) else argument
