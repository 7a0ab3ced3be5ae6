"""Programs as text: what was written is what runs, part by part, and what no part changes runs once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sptc.ir.program import Call, Parts, Program, Value, parse

# (a + 1 in fp64) times exp(b), and a list of both; the first input differs from part to part.
PROGRAM = Program(
    (
        Call("_to_copy.default", (Value(0),), {"dtype": torch.float64, "layout": torch.strided, "device": torch.device("cpu")}),
        Call("add.Scalar", (Value(2), 1), {"alpha": 1.0}),
        Call("exp.default", (Value(1),), {}),
        Call("mul.Tensor", (Value(3), Value(4)), {}),
        Call("cat.default", ([Value(5), Value(4)], 0), {}),
    ),
    (5, 6, 0),
)


def test_text_holds_all_of_it() -> None:
    assert parse(str(PROGRAM)) == PROGRAM and str(parse(str(PROGRAM))) == str(PROGRAM)
    assert parse('{"calls":[["mm.default",[["value",0],["value",1]],{}]],"results":[2]}').calls[0].operator is torch.ops.aten.mm.default


def test_text_holds_every_argument_of_an_operator() -> None:
    given = {"layout": torch.strided, "memory_format": torch.contiguous_format, "number": float("inf"), "none": None}
    written = Program((Call("clone.default", (Value(0), [-0.0, 1e-300], True, "tanh"), given),), (1,))
    assert parse(str(written)) == written


def test_what_is_no_argument_of_an_operator_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"can't hold .*Generator"):
        str(Program((Call("bernoulli.default", (Value(0),), {"generator": torch.Generator()}),), (1,)))


def test_parts_share_what_does_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    inner = Call.operator.func  # type: ignore[attr-defined]
    monkeypatch.setattr(Call, "operator", property(lambda call: ran.append(call.name) or inner(call)))
    a, b = torch.randn(6, 3), torch.randn(1, 3)
    parts = Parts(PROGRAM, 1, [b])
    for part in (a[:4], a[4:]):
        product, both, same = parts.run(part)
        expected = (part.double() + 1) * b.exp()
        torch.testing.assert_close(product, expected)
        torch.testing.assert_close(both, torch.cat([expected, b.exp().double()]))
        assert same is part
    assert ran.count("exp.default") == 1 and ran.count("mul.Tensor") == 2


def test_nothing_outlives_a_run() -> None:
    """Without help of the garbage collector."""
    gc.disable()
    try:
        x, shared = torch.randn(4, 3), torch.randn(1, 3)
        copies = Program((Call("exp.default", (Value(1),), {}), Call("mul.Tensor", (Value(0), Value(2)), {})), (2, 3))
        parts = Parts(copies, 1, [shared])
        found = [weakref.ref(value) for value in parts.run(x)]
        assert found[0]() is not None and found[1]() is None
        del parts
        assert found[0]() is None
    finally:
        gc.enable()


def test_what_a_part_needs_no_more_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain of eight values at most the one that is read and the one that is made are alive."""
    calls = tuple(Call("sin.default", (Value(i),), {}) for i in range(8))
    made: list[weakref.ref] = []
    most: list[int] = []
    inner = Call.operator.func  # type: ignore[attr-defined]

    def watched(call: Call) -> object:
        def run(x: torch.Tensor) -> torch.Tensor:
            y = inner(call)(x)
            made.append(weakref.ref(y))
            most.append(sum(one() is not None for one in made))
            return y

        return run

    monkeypatch.setattr(Call, "operator", property(watched))
    Parts(Program(calls, (8,)), 1, []).run(torch.randn(3))
    assert max(most) == 2
