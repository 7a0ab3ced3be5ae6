"""Predicates against Python's own evaluation of the same text, and range bounds against brute force."""

import itertools

import pytest
import torch

from sptc.ir.predicate import PredicateError, Ranges, parse

B, H, N, M = 2, 3, 11, 13
SIZES = (3, 2)


def tensors():
    generator = torch.Generator().manual_seed(0)
    padding = torch.rand(B, M, generator=generator) > 0.3
    documents = torch.sort(torch.randint(0, 4, (B, M), generator=generator)).values
    return padding, documents, torch.randint(-3, 9, (H,), generator=generator)


TEXTS = [
    "True",
    "k <= q",
    "(k <= q) & (k > q - s0)",
    "(k <= q + s1) & t0[b, k]",
    "t1[b, q] == t1[b, k]",
    "~(t1[b, q] == t1[b, k]) | (k < s0)",
    "(q // 4 == k // 4) & (k % 3 != 1)",
    "t0[b, (k + q) % 13]",
    "(k * 2 - q >= t2[h]) & ~t0[b, k]",
    "(-3 <= q - k) & (q - k <= 3) | (k == 0)",
    "t1[b, k]",
    "(k - q) * (h - 1) < 4",
    "(k <= q) & False",
]


def python_value(text, b, h, q, k):
    t = {f"t{i}": t.tolist() for i, t in enumerate(tensors())}

    class Nested:
        def __init__(self, values):
            self.values = values

        def __getitem__(self, indices):
            value = self.values
            for i in indices if isinstance(indices, tuple) else (indices,):
                value = value[i]
            return value

    # Python's ~ on a bool is arithmetic; `not` binds looser, but every ~ of the texts stands before one operand.
    scope = {name: Nested(v) for name, v in t.items()} | {"s0": SIZES[0], "s1": SIZES[1], "b": b, "h": h, "q": q, "k": k}
    text = text.replace("~(t1[b, q] == t1[b, k])", "(t1[b, q] != t1[b, k])").replace("~t0[b, k]", "(not t0[b, k])")
    return bool(eval(text, {}, scope))


def element_values(text):
    b, h, q, k = (
        torch.arange(B).view(-1, 1, 1, 1),
        torch.arange(H).view(1, -1, 1, 1),
        torch.arange(N).view(-1, 1),
        torch.arange(M).view(1, -1),
    )
    return parse(text).evaluate(b, h, q, k, tensors(), SIZES).expand(B, H, N, M)


@pytest.mark.parametrize("text", TEXTS)
def test_evaluate_equals_python(text):
    got = element_values(text)
    for b, h, q, k in itertools.product(range(B), range(H), range(N), range(M)):
        assert bool(got[b, h, q, k]) == python_value(text, b, h, q, k), (text, b, h, q, k)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("steps", [(1, 1), (4, 3), (5, 13), (16, 2)])
def test_bounds_hold_and_tight_ones_are_exact(text, steps):
    q_step, k_step = steps
    tiles, blocks = -(-N // q_step), -(-M // k_step)
    predicate, values = parse(text), element_values(text)
    ranges = Ranges(
        torch.arange(B).view(-1, 1, 1, 1),
        torch.arange(H).view(1, -1, 1, 1),
        torch.arange(tiles).view(-1, 1),
        torch.arange(blocks).view(1, -1),
        q_step,
        k_step,
        N,
        M,
    )
    possible, certain = (x.expand(B, H, tiles, blocks) for x in predicate.bounds(ranges, tensors(), SIZES))
    for b, h, i, j in itertools.product(range(B), range(H), range(tiles), range(blocks)):
        part = values[b, h, i * q_step : (i + 1) * q_step, j * k_step : (j + 1) * k_step]
        assert possible[b, h, i, j] or not part.any()
        assert not certain[b, h, i, j] or part.all()
        if predicate.tight:
            assert possible[b, h, i, j] == part.any()


def test_which_predicates_are_tight():
    assert [parse(t).tight for t in ("k <= q", "t0[b, k]", "k > q - s0", "t1[b, q] == t1[b, k]", "k <= q * k")] == [True] * 3 + [False] * 2


def test_conjuncts_names_and_counts():
    predicate = parse("((k <= q) & t0[b, k]) & (True & (q < s1))")
    assert [str(c) for c in predicate.conjuncts] == ["k <= q", "t0[b, k]", "q < s1"]
    assert [c.names for c in predicate.conjuncts] == [{"k", "q"}, {"b", "k"}, {"q"}]
    assert predicate.uses("b") and not predicate.uses("h")
    assert (predicate.tensor_count, predicate.size_count) == (1, 2)
    assert parse("True").conjuncts == ()


@pytest.mark.parametrize("text", TEXTS)
def test_canonical_text_is_a_fixed_point(text):
    canonical = str(parse(text))
    assert str(parse(canonical)) == canonical and parse(canonical) == parse(text)
    assert parse(f" ({text}) ") == parse(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("k <= q & t0[b, k]", "column 6: expected a condition here; put comparisons in parentheses"),
        ("0 <= q <= k", "column 1: a comparison has two operands"),
        ("k <= x", "column 6: unknown name 'x'"),
        ("t0 == 1", "a tensor needs indices"),
        ("h[b]", "'h' cannot be indexed"),
        ("k + q", "is a number, not a condition"),
        ("(k <= q) + 1 == 2", "column 2: expected a number"),
        ("k <= q.real", "Attribute is not in the grammar"),
        ("abs(k) < 3", "Call is not in the grammar"),
        ("k <= 1.5", "Constant is not in the grammar"),
        ("not t0[b, k]", "UnaryOp is not in the grammar"),
        ("k <= (q", "does not parse at column"),
        ("k is q", "Is is not in the grammar"),
        ("", "does not parse"),
    ],
)
def test_errors_say_where(text, message):
    with pytest.raises(PredicateError) as error:
        parse(text)
    assert message in str(error.value)


def test_operands_must_fit():
    with pytest.raises(PredicateError, match="names s1, but 1 sizes"):
        parse("k < s1").check([], [4])
    with pytest.raises(PredicateError, match="names t0, but 0 tensors"):
        parse("t0[b, k]").check([], [])
    with pytest.raises(PredicateError, match=r"gives t0 2 indices; its shape is \[3\]"):
        parse("t0[b, k]").check([torch.zeros(3)], [])
