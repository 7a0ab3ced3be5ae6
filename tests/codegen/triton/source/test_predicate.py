"""Emitted predicates, interpreted, against `Predicate.evaluate` and against all pairs of a range."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sptc.codegen.triton.source.predicate import predicate_source
from sptc.codegen.triton.source.specialize import specialize
from sptc.codegen.triton.spec import KernelSpec
from sptc.ir.predicate import PredicateError, parse

B, H, N, M = 2, 3, 13, 21
CPU = torch.device("cpu")
ELEMENTS = """
@triton.jit
def elements(out, T: many("TENSORS"), T_STRIDE: many("STRIDES"), S: many("SIZES"), heads, n, m, q_from, k_from, TENSORS: tl.constexpr,
             STRIDES: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    b = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    if TRANSPOSED:
        q = tl.arange(0, ROWS)[None, :]
        k = tl.arange(0, COLUMNS)[:, None]
    else:
        q = tl.arange(0, ROWS)[:, None]
        k = tl.arange(0, COLUMNS)[None, :]
    live = (q < n) & (k < m)
    keep = allowed(b, h, q + q_from, k + k_from, live, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES])
    by_tensors = allowed_by_tensors(b, h, q + q_from, k + k_from, live, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES])
    by_positions = allowed_by_positions(b, h, q + q_from, k + k_from, live, *T[:TENSORS], *T_STRIDE[:STRIDES], *S[:SIZES])
    at = out + tl.program_id(0) * n * m + q * m + k
    tl.store(at, tl.where(keep, 1, 0) + tl.where(by_tensors, 2, 0) + tl.where(by_positions, 4, 0), mask=live)
"""
RANGES = """
@triton.jit
def ranges(out, rectangles, S: many("SIZES"), b, h, SIZES: tl.constexpr):
    first = rectangles + 4 * tl.program_id(0)
    q_first = tl.load(first)
    q_last = tl.load(first + 1)
    k_first = tl.load(first + 2)
    k_last = tl.load(first + 3)
    certain = holds_throughout(b, h, q_first, q_last, k_first, k_last, *S[:SIZES])
    nowhere = ~holds_nowhere(b, h, q_first, q_last, k_first, k_last, *S[:SIZES])
    result = 0
    if certain:
        result = 1
    if nowhere:
        result += 2
    tl.store(out + tl.program_id(0), result)
"""


@pytest.fixture(autouse=True)
def probes(template):
    template("elements", ELEMENTS)
    template("ranges", RANGES)


def operands():
    """Padding [b, k] of bools, documents [b, position], offsets [b, h] with negatives, by odd strides."""
    generator = torch.Generator().manual_seed(0)
    padding = torch.rand(B, M + 5, generator=generator) > 0.3
    documents = torch.randint(-2, 2, (M + 5, B), generator=generator).sort(0)[0].t()
    return [padding, documents, torch.randint(-9, 9, (B, 2 * H), generator=generator)[:, ::2]]


def evaluated(text, tensors, sizes, q_from=0, k_from=0):
    predicate = parse(text)
    b, h = torch.arange(B).view(-1, 1, 1, 1), torch.arange(H).view(1, -1, 1, 1)
    q, k = torch.arange(N).view(-1, 1) + q_from, torch.arange(M).view(1, -1) + k_from
    return predicate.evaluate(b, h, q, k, tensors, sizes).expand(B, H, N, M)


def run_elements(text, tensors, sizes, q_from=0, k_from=0, transposed=False):
    from sptc.codegen.triton.run.load import load

    tensors, sizes = tensors[: parse(text).tensor_count], sizes[: parse(text).size_count]
    read = {element.position for element in parse(text).elements}
    strides = [stride for i, tensor in enumerate(tensors) if i in read for stride in tensor.stride()]
    constants = {"TENSORS": len(tensors), "STRIDES": len(strides), "SIZES": len(sizes), "ROWS": 16, "COLUMNS": 32, "TRANSPOSED": transposed}
    out = torch.full((B, H, N, M), -1, dtype=torch.int32)
    arguments = {"out": out, "heads": H, "n": N, "m": M, "q_from": q_from, "k_from": k_from}
    for name, values in (("T", tensors), ("T_STRIDE", strides), ("S", sizes)):
        arguments |= {f"{name}_{i}": value for i, value in enumerate(values)}
    load(KernelSpec.of("elements", constants, {"predicate": text}), interpret=True).launch((B * H,), arguments, CPU)
    return [(out & bit).bool() for bit in (1, 2, 4)]


CASES = [
    ("True", []),
    ("False", []),
    ("k <= q", []),
    ("k <= (q + s0)", [8]),
    ("(k <= q) & (k > (q - s0))", [4]),
    ("t0[b, k]", []),
    ("~t0[b, k] | (k == q)", []),
    ("(k <= q) & t0[b, k]", []),
    ("(t1[b, q] == t1[b, k]) & (k <= q)", []),
    ("(k - q) <= t2[b, h]", []),
    ("t0[b, t1[b, k] + 2] & (h > 0)", []),
    ("(((q - s0) // 4) == ((k - s0) // 4)) & (((k - 10) % 3) != 1)", [7]),
    ("~((k < q) & ~(((q * 2) - (k * s0)) > 3))", [1]),
    ("(h == 1) | ~(b == 0)", []),
    ("((q // -3) < (k % -5)) | (s1 > s0)", [3, 2]),
]


@pytest.mark.parametrize("text, sizes", CASES, ids=[text for text, _ in CASES])
@pytest.mark.parametrize("transposed", [False, True], ids=["qk", "kq"])
def test_elements_are_those_of_the_predicate(text, sizes, transposed):
    tensors = operands()
    keep, by_tensors, by_positions = run_elements(text, tensors, sizes, 3, 2, transposed)
    torch.testing.assert_close(keep, evaluated(text, tensors, sizes, 3, 2))
    for got, read in ((by_tensors, True), (by_positions, False)):
        chosen = [str(part) for part in parse(text).conjuncts if bool(part.tensor_count) == read]
        expected = evaluated(" & ".join(f"({part})" for part in chosen), tensors, sizes, 3, 2) if chosen else torch.ones_like(keep)
        torch.testing.assert_close(got, expected)


def test_negative_operands_round_down():
    text = "((q // s0) == (k // 4)) & ((q % s0) == (k % 4))"
    keep, *_ = run_elements(text, [], [4], q_from=-7, k_from=-9)
    torch.testing.assert_close(keep, evaluated(text, [], [4], -7, -9))
    assert keep.any()


RECTANGLES = [
    (q, q + height - 1, k, k + width - 1)
    for (q, k), (height, width) in itertools.product(itertools.product((0, 3, 8, 17), (0, 2, 5, 16)), ((1, 1), (4, 4), (5, 3)))
]
BOUNDED = [
    ("True", [], True),
    ("False", [], True),
    ("k <= (q + s0)", [2], True),
    ("(k <= q) & (k > (q - s0))", [6], True),
    ("(k <= q) & t0[b, k]", [], True),
    ("~(k <= q) | (h == 1)", [], True),
    ("(k - q) == 1", [], True),
    ("((q * -2) + (k * s0)) >= s1", [2, 5], True),
    ("(q // 4) == (k // s0)", [4], True),
    ("((q % 4) < 2) & (k != 3)", [], True),
    ("(q * k) < 40", [], True),
    ("((q * q) - (q * k)) < s0", [30], False),
    ("((q - 9) // 4) < ((k - 9) % 6)", [], False),
    ("(k // (s0 - 4)) < 2", [1], False),
    ("(5 // q) < k", [], False),
]


def run_ranges(text, sizes, rectangles, b=1, h=1):
    from sptc.codegen.triton.run.load import load

    count = parse(text).size_count
    out = torch.full((len(rectangles),), -1, dtype=torch.int32)
    arguments = {"out": out, "rectangles": torch.tensor(rectangles, dtype=torch.int32), "b": b, "h": h}
    arguments |= {f"S_{i}": size for i, size in enumerate(sizes[:count])}
    load(KernelSpec.of("ranges", {"SIZES": count}, {"predicate": text}), interpret=True).launch((len(rectangles),), arguments, CPU)
    return (out & 1).bool().tolist(), (~(out & 2).bool()).tolist()


def free_part(text):
    """The conjuncts that read no tensor, as one predicate."""
    return " & ".join(f"({part})" for part in parse(text).conjuncts if not part.tensor_count) or "True"


def truths(text, sizes, rectangle, b=1, h=1):
    """Whether the predicate holds for all, and for none, of a rectangle."""
    q = torch.arange(rectangle[0], rectangle[1] + 1).view(-1, 1)
    k = torch.arange(rectangle[2], rectangle[3] + 1).view(1, -1)
    values = parse(text).evaluate(torch.tensor(b), torch.tensor(h), q, k, [], sizes)
    return bool(values.all()), not bool(values.any())


@pytest.mark.parametrize("text, sizes, exact", BOUNDED, ids=[text for text, _, _ in BOUNDED])
def test_ranges_are_decided_rightly(text, sizes, exact):
    """What is certain is true; what single comparisons of monotone sides decide is found out."""
    rectangles = [r for r in RECTANGLES if r[0] > 0 or "// q" not in text]
    certain, nowhere = run_ranges(text, sizes, rectangles)
    expected = [truths(free_part(text), sizes, rectangle) for rectangle in rectangles]
    for got, want in zip(zip(certain, nowhere, strict=True), expected, strict=True):
        assert got[0] <= want[0] and got[1] <= want[1]
    if exact:
        assert [sum(certain), sum(nowhere)] == [sum(column) for column in zip(*expected, strict=True)]


def random_conditions() -> st.SearchStrategy[str]:
    numbers = st.recursive(
        st.sampled_from(["q", "k", "b", "h", "s0", "2", "-3", "5"]),
        lambda inner: st.one_of(
            st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner),
            st.builds("({} {} {})".format, inner, st.sampled_from(["//", "%"]), st.sampled_from(["3", "s0", "4"])),
        ),
        max_leaves=4,
    )
    comparisons = st.builds("({} {} {})".format, numbers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers)
    return st.recursive(
        comparisons,
        lambda inner: st.one_of(st.builds("({} {} {})".format, inner, st.sampled_from("&|"), inner), st.builds("(~{})".format, inner)),
        max_leaves=3,
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random_conditions(), st.integers(1, 6))
def test_random_predicates(text, size):
    keep, *_ = run_elements(text, [], [size], q_from=-5, k_from=-3)
    torch.testing.assert_close(keep, evaluated(text, [], [size], -5, -3))
    rectangles = RECTANGLES[::5]
    certain, nowhere = run_ranges(text, [size], rectangles)
    for rectangle, *got in zip(rectangles, certain, nowhere, strict=True):
        want = truths(text, [size], rectangle)
        assert got[0] <= want[0] and got[1] <= want[1]


def test_what_reads_no_tensor_loads_nothing_and_each_element_is_read_once():
    source = predicate_source("(t0[b, k] == t0[b, q]) & (t0[b, k] > 0)", "allowed")
    assert source.count("element(") == 2
    spec = KernelSpec.of("ranges", {"SIZES": 0}, {"predicate": "(k <= q) & t0[b, k]"})
    assert "element(" not in specialize(spec)


def test_a_tensor_with_two_ranks_is_refused():
    with pytest.raises(PredicateError, match="gives t0"):
        predicate_source("t0[b] & t0[b, k]", "allowed")
