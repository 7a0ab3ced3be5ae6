"""From a spec to the source of a Triton module: `codegen/triton/templates/language.py` defines what templates may say.

Specialising works on the syntax tree: it binds the constants (`codegen/triton/source/fold.py`), writes the hooks from the spec's
expressions, copies the helpers that are still called, and drops what nothing reads.
"""

from __future__ import annotations

import ast
import builtins
import copy
import functools
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sptc.codegen.triton.source import predicate as triton_predicate
from sptc.codegen.triton.source import transform as triton_transform
from sptc.codegen.triton.source.fold import SpecializeError, Unknown, fold, value_of
from sptc.codegen.triton.source.prune import has_effects, prune
from sptc.codegen.triton.spec import Constant, KernelSpec

TEMPLATES = Path(__file__).parent.parent / "templates"
_PACKAGE = "sptc.codegen.triton.templates."
_HOOKS = {
    **dict.fromkeys(triton_predicate.PREDICATE_HOOKS, ("predicate", triton_predicate.predicate_source, triton_predicate.HELPERS)),
    **dict.fromkeys(triton_transform.TRANSFORM_HOOKS, ("transform", triton_transform.transform_source, triton_transform.HELPERS)),
}

__all__ = ["SpecializeError", "specialize"]


@dataclass(frozen=True)
class _Module:
    """A template file: its jit functions, the constants it defines, and where the names that it imports come from."""

    functions: Mapping[str, ast.FunctionDef]
    constants: Mapping[str, Constant]
    imports: Mapping[str, tuple[str, str]]


@functools.lru_cache(maxsize=256)
def specialize(spec: KernelSpec) -> str:
    """The source of a module with the kernel of `spec`, and nothing in it that the spec decides.

    Raises:
        SpecializeError: no such template, a constant is missing, unknown or of the wrong kind, or a called function is unknown.
    """
    module = _module(spec.template)
    where = f"template {spec.template!r}"
    if spec.template not in module.functions:
        raise SpecializeError(f"{where} has no @triton.jit function of that name")
    kernel = copy.deepcopy(module.functions[spec.template])
    constants = dict(spec.constants)
    if unknown := constants.keys() - (known := _constants_of(kernel)):
        raise SpecializeError(f"{where} has no constant {', '.join(map(repr, sorted(unknown)))}; it has {_listed(known)}")
    _bind_parameters(kernel, constants, where)
    fold(kernel, {**module.constants, **constants}, where)
    helpers = _Helpers(spec, where)
    helpers.add_calls(kernel, spec.template)
    prune(kernel, helpers.effects)
    _drop_unread_parameters(kernel)
    helpers = _Helpers(spec, where)  # only what pruning left
    helpers.add_calls(kernel, spec.template)
    functions = [*helpers.functions.values(), kernel]
    imports = ["import triton", "import triton.language as tl"]
    body = "\n\n\n".join(map(_text, functions))
    if "libdevice." in body:
        imports.append("from triton.language.extra import libdevice")
    return "\n".join(imports) + "\n\n\n" + body + "\n"


def _text(function: ast.FunctionDef) -> str:
    """The source of a decorated function; a long signature takes several lines."""
    decorator, signature, *body = ast.unparse(ast.fix_missing_locations(function)).split("\n")
    return "\n".join([decorator, *textwrap.wrap(signature, 120, subsequent_indent=" " * 8, break_long_words=False), *body])


def _constants_of(function: ast.FunctionDef) -> set[str]:
    """The constants that the parameters name: those that are one, and the counts of those that stand for many."""
    names: set[str] = set()
    for arg in function.args.args:
        match arg.annotation:
            case ast.Attribute(value=ast.Name(id="tl"), attr="constexpr"):
                names.add(arg.arg)
            case ast.Call(func=ast.Name(id="many"), args=[ast.Constant(value=str() as count)]):
                names.add(count)
    return names


def _bind_parameters(function: ast.FunctionDef, constants: Mapping[str, Constant], where: str, own: bool = True) -> None:
    """Take the constants out of the signature (if they are `own`: a kernel's) and write out the parameters that stand for many."""
    arguments = []
    if function.args.posonlyargs or function.args.kwonlyargs or function.args.vararg or function.args.kwarg or function.args.defaults:
        raise SpecializeError(f"{where}: parameters are plain names without defaults")
    for arg in function.args.args:
        match arg.annotation:
            case ast.Attribute(value=ast.Name(id="tl"), attr="constexpr") if own:
                if arg.arg not in constants:
                    raise SpecializeError(f"{where} needs a value for its constant {arg.arg!r}; given: {_listed(constants)}")
            case ast.Call(func=ast.Name(id="many"), args=[ast.Constant(value=str() as count)]):
                number = constants.get(count)
                if type(number) is not int or number < 0:
                    raise SpecializeError(
                        f"{where}: constant {count!r}, the number of {arg.arg!r}, must be an integer from 0 up, got {number!r}"
                    )
                arguments += [ast.arg(f"{arg.arg}_{i}") for i in range(number)]
            case _:
                arguments.append(arg)
    function.args.args = arguments


def _drop_unread_parameters(function: ast.FunctionDef) -> list[int]:
    """Take parameters that nothing reads out of the signature; returns the positions of the others."""
    read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    kept = [i for i, arg in enumerate(function.args.args) if arg.arg in read]
    function.args.args = [function.args.args[i] for i in kept]
    return kept


class _Helpers:
    """The functions that a kernel calls, directly or not: hooks and copied helpers, each before its first caller."""

    def __init__(self, spec: KernelSpec, where: str) -> None:
        self.functions: dict[str, ast.FunctionDef] = {}
        self.effects: set[str] = set()  # names of those that store something
        self._spec, self._where = spec, where
        self._homes: dict[str, str] = {}  # the template in which a helper stands
        self._kept: dict[str, tuple[list[str], list[int]]] = {}  # of a helper: its parameters, and which of them it reads

    def add_calls(self, function: ast.FunctionDef, template: str) -> None:
        """Add what `function`, which stands in the file `template`, calls, and pass helpers only what they read.

        Raises:
            SpecializeError: it calls a name that is no hook, helper or builtin, or a hook with a wrong number of arguments.
        """
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                self._add(node.func.id, node, template)

    def _add(self, name: str, call: ast.Call, template: str) -> None:
        if name in _HOOKS:
            self._add_hook(name, call)
            return
        found = _find(name, template)
        if found is None:
            if hasattr(builtins, name):
                return
            raise SpecializeError(f"{self._where}, line {call.lineno}: {name!r} is no hook, helper or builtin")
        home, original = found
        if self._homes.setdefault(name, home) != home:
            raise SpecializeError(f"{self._where} needs two functions {name!r}, of {home}.py and of {self._homes[name]}.py: rename one")
        if name not in self._kept:
            self._add_helper(name, home, copy.deepcopy(original))
        parameters, kept = self._kept[name]
        if len(call.args) + len(call.keywords) == len(parameters):  # else its arguments were taken out before
            call.args = [argument for i, argument in enumerate(call.args) if i in kept]
            call.keywords = [keyword for keyword in call.keywords if parameters.index(str(keyword.arg)) in kept]

    def _add_helper(self, name: str, home: str, function: ast.FunctionDef) -> None:
        where = f"helper {name!r} of template {home!r}"
        constants = dict(self._spec.constants)
        _bind_parameters(function, constants, where, own=False)
        parameters = [arg.arg for arg in function.args.args]
        known = {**_module(home).constants, **constants}
        fold(function, {key: value for key, value in known.items() if key not in parameters}, where)
        self.add_calls(function, home)
        prune(function, self.effects)
        if has_effects(function, self.effects):
            self.effects.add(name)
        self._kept[name] = parameters, _drop_unread_parameters(function)
        self.functions[name] = function

    def _add_hook(self, name: str, call: ast.Call) -> None:
        key, write, home = _HOOKS[name]
        text = dict(self._spec.hooks).get(key)
        if text is None:
            raise SpecializeError(f"{self._where} calls {name}(), which needs the hook {key!r}; given: {_listed(dict(self._spec.hooks))}")
        [function] = (node for node in ast.parse(write(text, name)).body if isinstance(node, ast.FunctionDef))
        parameters = [arg.arg for arg in function.args.args]
        if len(parameters) != len(call.args):
            raise SpecializeError(
                f"{self._where}, line {call.lineno}: {name}() of {text!r} takes {len(parameters)} arguments "
                f"({', '.join(parameters)}), but gets {len(call.args)}"
            )
        if name not in self.functions:
            self.add_calls(function, home)
            self.functions[name] = function


def _find(name: str, template: str) -> tuple[str, ast.FunctionDef] | None:
    """Where `name`, as seen in a template's file, is defined, and its definition."""
    module = _module(template)
    if name in module.functions:
        return template, module.functions[name]
    if name in module.imports:
        home, original = module.imports[name]
        return _find(original, home)
    return None


def _module(template: str) -> _Module:
    path = next(TEMPLATES.rglob(f"{template}.py"), None) if template.isidentifier() else None
    if path is None:
        raise SpecializeError(f"no template {template!r} in {TEMPLATES.name}/: there are {_listed(_names())}")
    return _read(path.read_text())


@functools.lru_cache(maxsize=256)
def _read(source: str) -> _Module:
    tree = ast.parse(source)
    functions: dict[str, ast.FunctionDef] = {}
    constants: dict[str, Constant] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        match node:
            case ast.FunctionDef() if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                functions[node.name] = node
            case ast.Assign(targets=[ast.Name(id=name)], value=value) | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                constant = _constant(value, constants)
                if isinstance(constant, bool | int | float | str):
                    constants[name] = constant
            case ast.ImportFrom(module=str() as home) if home.startswith(_PACKAGE) and home != _PACKAGE + "language":
                for alias in node.names:
                    imports[alias.asname or alias.name] = home.rpartition(".")[2], alias.name
    return _Module(functions, constants, imports)


def _constant(value: ast.expr, known: Mapping[str, Constant]) -> object:
    """What a module-level assignment makes a constant: an expression of literals, perhaps inside tl.constexpr()."""
    holder = ast.FunctionDef("constant", ast.arguments([], [], None, [], [], None, []), [ast.Return(copy.deepcopy(value))], [])
    fold(holder, known, "a module")
    [statement] = holder.body
    return value_of(statement.value) if isinstance(statement, ast.Return) and statement.value is not None else Unknown


def _names() -> Iterator[str]:
    return (path.stem for path in TEMPLATES.rglob("*.py") if path.stem not in ("__init__", "language"))


def _listed(names: object) -> str:
    return ", ".join(sorted(names)) or "none"  # type: ignore[call-overload]
