"""What specialising makes of a template: the text, and the messages where template and spec do not fit."""

from __future__ import annotations

import ast

import pytest

from sptc.codegen.triton.source.layout import WIDTH, parse, print_statements
from sptc.codegen.triton.source.prune import prune
from sptc.codegen.triton.source.specialize import TEMPLATES, SpecializeError, specialize
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


READS_WELL = '''
from sptc.codegen.triton.templates.attention.philox import philox_keep
from sptc.codegen.triton.templates.selection.integers import floor_divide as divide

LEAST: tl.constexpr = tl.constexpr(1 << 4)


@triton.jit
def other(x):
    return x


@triton.jit
def twice(x, CAREFUL: tl.constexpr):
    # A sum, not a product.
    return x + x if CAREFUL else other(x)


@triton.jit
def probe(
    out,  # [n]
    seed_ptr, n, threshold, first_long_name, second_long_name, third_long_name, fourth_long_name, fifth_long_name, a_longer_name,
    # What only one branch reads.
    extra, BLOCK: tl.constexpr, DROPPED: tl.constexpr, EXTRA: tl.constexpr,
):
    """One line.

        Indented.
    """
    # Rows of this program.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]

    # Dropped elements are zero.
    if DROPPED:
        # By the seed.
        value = tl.where(philox_keep(seed_ptr, at, threshold), first_long_name, 0.0)  # noqa: X
    else:
        # All of them.
        value = twice(at, CAREFUL=True) + LEAST
    # Only with extra.
    if EXTRA:
        value += tl.load(extra + at)
    value += third_long_name * fourth_long_name
    tl.store(out + at, value + first_long_name + second_long_name * fifth_long_name, mask=(at < n) & (a_longer_name > 0))
'''  # fmt: skip


def test_emitted_source_reads_like_its_template(template):
    template("probe", READS_WELL)
    constants = {"BLOCK": 32, "DROPPED": False, "EXTRA": False}
    source = specialize(KernelSpec.of("probe", constants))
    assert source.startswith("import triton\nimport triton.language as tl\n\n\n@triton.jit\n")
    assert max(map(len, source.splitlines())) <= WIDTH
    kernel = source[source.index("def probe") :]
    assert kernel.startswith("def probe(\n    out,  # [n]\n    n, first_long_name,")
    assert (
        '    """One line.\n\n    Indented.\n    """\n    # Rows of this program.\n'
        "    at = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)  # [32]\n\n"
        "    # All of them.\n    value = twice(at, CAREFUL=True) + 16\n"
    ) in kernel
    assert "extra" not in kernel and "# By the seed" not in kernel and "Dropped elements" not in kernel
    assert "# A sum, not a product." in source and "philox_keep" not in source
    assert source.index("def other") < source.index("def twice") < source.index("def probe")
    dropped = specialize(KernelSpec.of("probe", {**constants, "DROPPED": True, "EXTRA": True}))
    assert "    # Dropped elements are zero.\n    # By the seed.\n    value = " in dropped and "noqa" not in dropped
    assert "def philox_keep" in dropped and "def twice" not in dropped and "    # What only one branch reads.\n    extra," in dropped
    ast.parse(dropped)


def test_printing_keeps_the_meaning():
    """Every file of templates, printed, is the same tree."""
    for path in sorted(set(TEMPLATES.rglob("*.py")) - {TEMPLATES / "language.py"}):
        tree = parse(path.read_text())
        printed = ast.parse("\n".join(print_statements(tree.body)))
        assert _without_docstrings(printed) == _without_docstrings(ast.parse(path.read_text())), path


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
