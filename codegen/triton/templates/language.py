"""The language of kernel templates: Triton, and what `codegen/triton/source/specialize.py` resolves before Triton sees it.

A template is a file of this folder with a `@triton.jit` function of the same name. Specialising it writes an ordinary Triton module in
which everything that a spec decides is decided:

- A parameter `X: tl.constexpr` leaves the signature and becomes its value. Expressions of constants fold, and so do `if`, conditional
  expressions, `and`, `or`, `not` and `assert` on them; the branches not taken disappear, and so do locals and parameters that nothing
  reads any more. A local `X: tl.constexpr = ...` folds likewise, and so does a constant of the module.
- A parameter `T: many("TENSORS")` becomes `T_0` to `T_{TENSORS - 1}`; `*T[:TENSORS]` in a call is all of them.
- The hooks below stand for functions that are written from the spec's predicate, the model's mask, and its transform, what the model makes
  of each score. A template imports them from here; only those that are called are written.
- Helpers are `@triton.jit` functions of the same file or imported from another file of this folder; those that are called are copied.
  A helper sees the constants of its module and of the spec, and may have parameters that stand for many; a parameter of its own goes
  before a constant of its name. What it does not read is not passed to it.
- The source is written by `ast.unparse`: comments stay in the template, which the head of an emitted file names.
"""

from __future__ import annotations

from typing import Any

_ONLY_IN_TEMPLATES = (
    "stands for code that codegen/triton/source/specialize.py writes: a template runs as specialised, by codegen/triton/run/load.py"
)


def many(count: str) -> Any:
    """Annotation of a parameter that stands for as many as the constant `count` says."""
    return count


def allowed(b: Any, h: Any, q: Any, k: Any, live: Any, *operands: Any) -> Any:
    """The mask's predicate at positions that broadcast to `live` (bool: which of them exist); bool of that shape.

    `operands` are the tensors, the strides of all their dimensions in order, and the sizes. Outside `live` nothing is loaded, and the
    result has no meaning.
    """
    raise _unspecialised("allowed")


def allowed_by_tensors(b: Any, h: Any, q: Any, k: Any, live: Any, *operands: Any) -> Any:
    """As `allowed`, of those conjuncts only that read a tensor."""
    raise _unspecialised("allowed_by_tensors")


def allowed_by_positions(b: Any, h: Any, q: Any, k: Any, live: Any, *operands: Any) -> Any:
    """As `allowed`, of the other conjuncts, which read no tensor: those that `holds_throughout` and `holds_nowhere` are about."""
    raise _unspecialised("allowed_by_positions")


def holds_throughout(b: Any, h: Any, q_first: Any, q_last: Any, k_first: Any, k_last: Any, *sizes: Any) -> Any:
    """Scalar bool: each conjunct that reads no tensor certainly holds for all q and k of these ranges, bounds included."""
    raise _unspecialised("holds_throughout")


def holds_nowhere(b: Any, h: Any, q_first: Any, q_last: Any, k_first: Any, k_last: Any, *sizes: Any) -> Any:
    """Scalar bool: some conjunct that reads no tensor certainly fails for all q and k of these ranges, bounds included."""
    raise _unspecialised("holds_nowhere")


def transformed(u0: Any) -> Any:
    """What the model makes of scores before its mask, in fp32."""
    raise _unspecialised("transformed")


def transform_slope(u0: Any) -> Any:
    """The derivative of `transformed`; a number where it is constant."""
    raise _unspecialised("transform_slope")


def _unspecialised(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name}() {_ONLY_IN_TEMPLATES}")
