"""A failing program made small: statement by statement, then choice by choice, as long as what is left still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from tests.fuzz.grammar import Program, Statement, Use, Wrap
from tests.fuzz.regions import Attention, Ffn

T = TypeVar("T", Program, Use, Ffn, Attention)

PLAIN = {  # of each choice, what nobody would look at twice
    **dict.fromkeys(("up", "down", "projection"), "linear"),
    **dict.fromkeys(("gate", "group", "mask", "hazard"), "none"),
    **{"activation": "relu", "qkv": "three", "spelling": "sdpa", "output": "tensor", "dtype": "float64"},
    **{"train": True, "residual": True, "input_grad": False},
}


def reduced(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program that is reached by steps after each of which it still fails."""
    while (smaller := next((p for p in _steps(program) if fails(p)), None)) is not None:
        program = smaller
    return program


def _steps(program: Program) -> Iterator[Program]:
    for body in _shorter(program.body):
        if body:
            yield replace(program, body=body)
    yield from _plainer(program)
    for body in _plainer_inside(program.body):
        yield replace(program, body=body)


def _shorter(body: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
    """Without one statement, or with what a wrap holds in its place."""
    for i, statement in enumerate(body):
        yield _with(body, i)
        if isinstance(statement, Wrap):
            yield _with(body, i, *statement.body)
            yield from (_with(body, i, replace(statement, body=inner)) for inner in _shorter(statement.body) if inner)


def _plainer_inside(body: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
    for i, statement in enumerate(body):
        if isinstance(statement, Wrap):
            yield from (_with(body, i, replace(statement, body=inner)) for inner in _plainer_inside(statement.body))
        elif isinstance(statement, Use):
            yield from (_with(body, i, use) for use in _plainer(statement))
            yield from (_with(body, i, replace(statement, region=region)) for region in _plainer(statement.region))


def _with(body: tuple[Statement, ...], i: int, *others: Statement) -> tuple[Statement, ...]:
    return (*body[:i], *others, *body[i + 1 :])


def _plainer(thing: T) -> Iterator[T]:
    for name, value in PLAIN.items():
        if getattr(thing, name, value) != value:
            yield replace(thing, **{name: value})
