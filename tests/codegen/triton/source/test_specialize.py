"""What specialising makes of a template: the text, and the messages where template and spec do not fit."""

from __future__ import annotations

import ast

import pytest

from sptc.codegen.triton.source.prune import prune
from sptc.codegen.triton.source.specialize import SpecializeError, specialize
from sptc.codegen.triton.spec import KernelSpec


def body(source: str, name: str = "probe") -> str:
    """The kernel's statements, without its signature."""
    [function] = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return "\n".join(ast.unparse(statement) for statement in function.body)


def parameters(source: str, name: str = "probe") -> list[str]:
    [function] = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return [arg.arg for arg in function.args.args]


def folded(template, statements: str, **constants) -> str:
    """`statements` as the body of a kernel with a helper f(x), these constants, and the parameters x, y and X: many("COUNT")."""
    constants = {"COUNT": 2, **constants}
    signature = ", ".join(f"{name}: tl.constexpr" for name in constants)
    lines = "".join(f"    {line}\n" for line in statements.splitlines())
    helper = "@triton.jit\ndef f(x):\n    return x\n"
    template("probe", f"{helper}@triton.jit\ndef probe(x, y, X: many('COUNT'), {signature}):\n{lines}")
    specialize.cache_clear()
    return specialize(KernelSpec.of("probe", constants))


FOLDED = [
    ("tl.store(x, A + 2 * A)", {"A": 3}, "tl.store(x, 9)"),
    ("tl.store(x, y - A)", {"A": -3}, "tl.store(x, y - -3)"),
    ("tl.store(x, y ** A if B else y)", {"A": -1, "B": True}, "tl.store(x, y ** (-1))"),
    ("tl.store(x, y + A)", {"A": float("-inf")}, "tl.store(x, y + float('-inf'))"),
    ("if A > 2 and B:\n    tl.store(x, 1)\nelif C:\n    tl.store(x, 2)", {"A": 3, "B": False, "C": True}, "tl.store(x, 2)"),
    ("if A and y > 0:\n    tl.store(x, 1)", {"A": True}, "if y > 0:\n    tl.store(x, 1)"),
    ("if A or y > 0:\n    tl.store(x, 1)", {"A": True}, "tl.store(x, 1)"),
    ("if y > 0:\n    if A:\n        tl.store(x, 1)\n    else:\n        pass", {"A": False}, "pass"),
    ("if y > 0:\n    if A:\n        tl.store(x, 1)\nelse:\n    tl.store(x, 2)", {"A": False}, "if not y > 0:\n    tl.store(x, 2)"),
    ("tl.store(x * A, y // A + B * 1.0)", {"A": 1, "B": 0}, "tl.store(x, y + 0.0)"),
    ("if not A == 'tf32':\n    tl.store(x, 1)\ntl.store(y, 1)", {"A": "tf32"}, "tl.store(y, 1)"),
    ("if A:\n    tl.store(x, 1)\n    return\ntl.store(y, 1)", {"A": True}, "tl.store(x, 1)\nreturn"),
    ("H: tl.constexpr = A // 2\ntl.store(x, tl.arange(0, H))", {"A": 64}, "tl.store(x, tl.arange(0, 32))"),
    ("tl.store(x, min(A, 16) + tl.cdiv(A, 5))", {"A": 9}, "tl.store(x, 11)"),
    ("tl.store(*X[:COUNT])", {}, "tl.store(X_0, X_1)"),
    ("tl.store(x[:, None], y[None, :])", {}, "tl.store(x[:, None], y[None, :])"),
    (
        "for j in tl.range(0, A, num_stages=A):\n    tl.store(x + j, A)",
        {"A": 3},
        "for j in tl.range(0, 3, num_stages=3):\n    tl.store(x + j, 3)",
    ),
    ("tl.static_assert(A > 1)\nassert A < 9\ntl.store(x, A)", {"A": 3}, "tl.store(x, 3)"),
]


@pytest.mark.parametrize("statements, constants, expected", FOLDED, ids=[case[0].replace("\n", "; ") for case in FOLDED])
def test_constants_fold(template, statements, constants, expected):
    source = folded(template, statements, **constants)
    assert body(source) == ast.unparse(ast.parse(expected))


def test_what_nothing_reads_disappears_with_its_parameters(template):
    source = folded(
        template,
        "at = x + 1\nunused = tl.load(y)\nptr = y\nfor j in range(3):\n    ptr = ptr + 1\n    ptr += 2\n"
        "a, b = at, y\nif A:\n    tl.store(*X[:1], a)",
        A=True,
    )
    assert body(source) == "at = x + 1\na, b = (at, y)\ntl.store(X_0, a)"
    assert parameters(source) == ["x", "y", "X_0"]
    assert parameters(folded(template, "if A:\n    tl.store(*X[:2], x)\ntl.store(*X[:1], y)", A=False)) == ["y", "X_0"]


@pytest.mark.parametrize("statement", ["tl.atomic_add(x, 1)", "old = tl.atomic_xchg(x, 1)", "tl.device_assert(x > 0)", "helper(x)"])
def test_effects_stay(statement):
    [function] = ast.parse(f"def probe(x):\n    {statement}").body
    prune(function, {"helper"})
    assert ast.unparse(function.body[0]) == statement


ERRORS = [
    ("tl.store(x, A)", {}, "needs a value for its constant 'A'; given: COUNT"),
    ("tl.store(x, A)", {"A": 1, "Z": 1}, "has no constant 'Z'; it has A, COUNT"),
    ("tl.store(x, A)", {"A": 1, "COUNT": 1.0}, "constant 'COUNT', the number of 'X', must be an integer from 0 up, got 1.0"),
    ("tl.store(x, A)", {"A": 1, "COUNT": True}, "must be an integer from 0 up, got True"),
    ("tl.store(*X[:y])", {"A": 1}, r"\*X\[:y\] needs a constant integer, got an expression"),
    ("tl.store(*X)", {"A": 1}, r"\*X: only name\[:N\]"),
    ("A = x\ntl.store(x, A)", {"A": 1}, "'A' is a constant and cannot be assigned to"),
    ("tl.static_assert(A % 16 == 0, 'a multiple of 16')", {"A": 8}, "A % 16 == 0 does not hold with A = 8: a multiple of 16"),
    ("tl.store(x, 1 // A)", {"A": 0}, "zero"),
    ("tl.store(x, actvation(y))", {"A": 1}, "'actvation' is no hook, helper or builtin"),
    ("tl.store(x, allowed(y))", {"A": 1}, r"calls allowed\(\), which needs the hook 'predicate'; given: none"),
]


@pytest.mark.parametrize("statements, constants, message", ERRORS, ids=[case[2] for case in ERRORS])
def test_errors_name_the_template_and_the_constant(template, statements, constants, message):
    lines = "".join(f"    {line}\n" for line in statements.splitlines())
    template("probe", f"@triton.jit\ndef probe(x, y, X: many('COUNT'), A: tl.constexpr, COUNT: tl.constexpr):\n{lines}")
    with pytest.raises(SpecializeError, match=f"template 'probe'.*{message}"):
        specialize(KernelSpec.of("probe", {"COUNT": 2, **constants}))


def test_a_hook_called_with_a_wrong_number_of_arguments(template):
    template("probe", "@triton.jit\ndef probe(x):\n    tl.store(x, allowed(x))\n")
    with pytest.raises(SpecializeError, match=r"takes 5 arguments \(b, h, q, k, live\), but gets 1"):
        specialize(KernelSpec.of("probe", {}, {"predicate": "k <= q"}))
    with pytest.raises(SpecializeError, match="no template 'missing'"):
        specialize(KernelSpec.of("missing", {}))


SHARED = """
from sptc.codegen.triton.templates.attention.philox import philox_keep
from sptc.codegen.triton.templates.selection.integers import floor_divide as divide

LEAST: tl.constexpr = tl.constexpr(1 << 4)


@triton.jit
def other(x):
    return x


@triton.jit
def twice(x, unread, BLOCK, S: many("SIZES"), CAREFUL: tl.constexpr):
    # A sum, not a product.
    if DROPPED:
        return unread
    return x + x * other(BLOCK) * LEAST + sum_of(*S[:SIZES]) if CAREFUL else other(x)


@triton.jit
def sum_of(S: many("SIZES")):
    return S_0 + S_1 if SIZES == 2 else 0


@triton.jit
def probe(out, seed_ptr, n, threshold, extra, S: many("SIZES"), BLOCK: tl.constexpr, DROPPED: tl.constexpr, SIZES: tl.constexpr):
    \"\"\"One line.\"\"\"
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if DROPPED:
        value = tl.where(philox_keep(seed_ptr, at, threshold), n, 0.0)
    else:
        value = twice(at, extra, n, *S[:SIZES], CAREFUL=True) + LEAST
    tl.store(out + at, value, mask=at < n)
"""


def test_helpers_see_the_constants_and_are_passed_what_they_read(template):
    """A helper's own parameter (BLOCK) goes before a constant of its name; what it does not read (extra) reaches nobody."""
    template("probe", SHARED)
    source = specialize(KernelSpec.of("probe", {"BLOCK": 32, "DROPPED": False, "SIZES": 2}))
    assert source.startswith("import triton\nimport triton.language as tl\n\n\n@triton.jit\n") and '"""One line."""' in source
    assert parameters(source) == ["out", "n", "S_0", "S_1"] and parameters(source, "twice") == ["x", "BLOCK", "S_0", "S_1", "CAREFUL"]
    assert "twice(at, n, S_0, S_1, CAREFUL=True) + 16" in source and "x + x * other(BLOCK) * 16 + sum_of(S_0, S_1)" in source
    assert source.index("def other") < source.index("def sum_of") < source.index("def twice") < source.index("def probe")
    assert max(len(line) for line in source.splitlines()) <= 140
    assert "extra" not in source and "philox_keep" not in source
    without = specialize(KernelSpec.of("probe", {"BLOCK": 32, "DROPPED": False, "SIZES": 0}))
    assert parameters(without) == ["out", "n"] and parameters(without, "sum_of") == []
    dropped = specialize(KernelSpec.of("probe", {"BLOCK": 32, "DROPPED": True, "SIZES": 2}))
    assert "def philox_keep" in dropped and "def twice" not in dropped
    assert parameters(dropped) == ["out", "seed_ptr", "n", "threshold"]
