"""Whoever wants to catch our errors has one class to name."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import sptc
from sptc.ir.errors import SptcError

WITHOUT_TRITON = ("templates", "repro_main", "__main__")  # imported by what needs them only


def classes() -> list[type[Exception]]:
    """Classes named Error. Other exceptions are caught where they are raised: they end a search, not a program."""
    found = set()
    for info in pkgutil.walk_packages(sptc.__path__, "sptc."):
        if not any(part in WITHOUT_TRITON for part in info.name.split(".")):
            module = importlib.import_module(info.name)
            found |= {x for name, x in vars(module).items() if name.endswith("Error") and isinstance(x, type) and x.__module__ == info.name}
    return sorted(found, key=lambda c: c.__name__)


def test_every_error_derives_from_one_class_and_from_a_builtin():
    ours = [c for c in classes() if c is not SptcError]
    assert len(ours) > 15
    for error in ours:
        assert issubclass(error, SptcError) and any(b.__module__ == "builtins" and b is not Exception for b in error.__mro__[:-3]), error


def test_it_is_public_and_catches_a_wrong_option():
    with pytest.raises(sptc.SptcError, match=r"did you mean 'ffn\.density'"):
        sptc.Config.from_options({"ffn.densty": 0.5})
