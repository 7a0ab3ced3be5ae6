"""Strategies that draw programs: simple choices first, since hypothesis shrinks towards them."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzz.grammar import OUTPUTS, STATEMENTS, WRAPS, Line, Program, Statement, Use, Wrap
from tests.fuzz.regions import (
    ACTIVATIONS,
    ATTENTION_HAZARDS,
    ATTENTIONS,
    FFN_HAZARDS,
    GATES,
    GROUPS,
    MASKS,
    PROJECTIONS,
    QKV,
    Attention,
    Ffn,
)


def _of(names: object) -> st.SearchStrategy[str]:
    return st.sampled_from(list(names))  # type: ignore[call-overload]


def _mostly(names: object, usual: int) -> st.SearchStrategy[str]:
    """Three times in four one of the `usual` first."""
    every = list(names)  # type: ignore[call-overload]
    return st.sampled_from([*every[:usual] * 3 * len(every[usual:]), *every[usual:] * usual])


_projection = _mostly(PROJECTIONS, 9)
_ffn = st.builds(Ffn, _projection, _projection, _mostly(ACTIVATIONS, 12), _mostly(GATES, 5), _mostly(FFN_HAZARDS, 1))
_attention = st.builds(
    Attention, _projection, _of(QKV), _mostly(ATTENTIONS, 4), _of(GROUPS), _mostly(MASKS, 12), _mostly(ATTENTION_HAZARDS, 1)
)
_simple: st.SearchStrategy[Statement] = st.builds(Use, _ffn | _attention, st.sampled_from([True, True, False])) | st.builds(
    Line, _of(STATEMENTS)
)


def _body(statements: st.SearchStrategy[Statement], longest: int) -> st.SearchStrategy[tuple[Statement, ...]]:
    return st.lists(statements, min_size=1, max_size=longest).map(tuple)


_nested = st.builds(Wrap, _of(WRAPS), _body(_simple | st.builds(Wrap, _of(WRAPS), _body(_simple, 2)), 3))

programs: st.SearchStrategy[Program] = st.builds(
    Program,
    body=_body(_simple | _nested, 4),
    output=_of(OUTPUTS),
    dtype=_of(["float32", "float64"]),
    train=st.sampled_from([True, True, True, False]),
    input_grad=st.booleans(),
)
