"""Dropping statements without effect from a kernel."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence

# What a call of Triton does beyond its value.
_EFFECTS = frozenset({"store", "assume", "debug_barrier", "device_assert", "device_print", "static_print", "inline_asm_elementwise"})


def prune(function: ast.FunctionDef, effects: Collection[str]) -> None:
    """Drop, in place, assignments to locals that nothing with an effect reads, and branches and loops left empty.

    Args:
        effects: names of functions that do more than compute their value.
    """
    live: set[str] = set()
    while True:
        before = len(live)
        _mark(function.body, live, effects)
        if len(live) == before:
            break
    function.body = _kept(function.body, live, effects) or [ast.Pass()]


def has_effects(node: ast.AST, effects: Collection[str] = ()) -> bool:
    """Whether something inside `node` does more than compute a value."""
    for call in ast.walk(node):
        if not isinstance(call, ast.Call):
            continue
        match call.func:
            case ast.Name(id=name) if name in effects:
                return True
            case ast.Attribute(attr=name) if name in _EFFECTS or name.startswith("atomic_"):
                return True
    return False


def _is_root(node: ast.stmt, effects: Collection[str]) -> bool:
    """Whether a simple statement matters by itself."""
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        return has_effects(node, effects)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or has_effects(node, effects)
    return not isinstance(node, ast.Pass)


def _stays(node: ast.stmt, live: Collection[str], effects: Collection[str]) -> bool:
    match node:
        case ast.If(body=body, orelse=orelse):
            return any(_stays(inner, live, effects) for inner in (*body, *orelse)) or has_effects(node.test, effects)
        case ast.For(body=body) | ast.While(body=body):
            return any(_stays(inner, live, effects) for inner in body)
    return _is_root(node, effects) or bool(_stored(node) & set(live))


def _mark(statements: Sequence[ast.stmt], live: set[str], effects: Collection[str]) -> None:
    """Add the names that statements which stay read."""
    for node in statements:
        if not _stays(node, live, effects):
            continue
        match node:
            case ast.If(test=test, body=body, orelse=orelse):
                live |= _loaded(test)
                _mark([*body, *orelse], live, effects)
            case ast.For(iter=head, body=body) | ast.While(test=head, body=body):
                live |= _loaded(head)
                _mark(body, live, effects)
            case _:
                live |= _loaded(node)


def _kept(statements: Sequence[ast.stmt], live: Collection[str], effects: Collection[str]) -> list[ast.stmt]:
    result = []
    for node in statements:
        if not _stays(node, live, effects):
            continue
        if isinstance(node, ast.If):
            node.orelse = _kept(node.orelse, live, effects)
        if isinstance(node, ast.If | ast.For | ast.While):
            node.body = _kept(node.body, live, effects)
        if isinstance(node, ast.If) and not node.body and node.orelse:
            node.test, node.body, node.orelse = ast.UnaryOp(ast.Not(), node.test), node.orelse, []
        if isinstance(node, ast.If | ast.For | ast.While):
            node.body = node.body or [ast.Pass()]
        result.append(node)
    return result


def _loaded(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)}


def _stored(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
