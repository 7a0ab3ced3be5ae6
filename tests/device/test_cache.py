"""The private folder for kernels and measurements: a place that cannot be written costs a sentence and time, nothing else."""

from __future__ import annotations

import logging
import os
import stat

import pytest

from sptc.codegen.cpu.compiler import library
from sptc.device import cache


@pytest.fixture(params=["home-is-a-file", "cache-is-a-file", "read-only"])
def unwritable(request, tmp_path, monkeypatch):
    """A home in which nothing can be kept, as that of a service account or on a read-only disk."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache, "_stand_ins", {})
    home = tmp_path / "home"
    if request.param == "home-is-a-file":
        home.touch()
    elif request.param == "cache-is-a-file":
        home.mkdir()
        (home / ".cache").touch()
    else:
        (home / ".cache" / "sptc").mkdir(parents=True, mode=0o700)
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(home)) and access(path, mode))
    monkeypatch.setenv("HOME", str(home))
    return home


def test_an_unwritable_place_is_said_once_and_replaced(unwritable, caplog):
    with caplog.at_level(logging.WARNING, "sptc"):
        folder = cache.private_folder("kernels")
        assert library('extern "C" int seven() { return 7; }', {}).seven() == 7
    (said,) = [r.getMessage() for r in caplog.records]
    assert str(unwritable) in said and "set XDG_CACHE_HOME" in said
    assert folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache.cache_folder() == folder.parent and not str(folder).startswith(str(unwritable))
    cache._remove(folder.parent, os.getpid() + 1)
    assert folder.exists(), "a forked child leaves it alone"
    cache._remove(folder.parent, os.getpid())
    assert not folder.parent.exists()


def test_a_folder_that_others_can_write_to_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sptc").mkdir()
    (tmp_path / "sptc").chmod(0o777)
    with pytest.raises(cache.CacheError, match="others can write to it"):
        cache.private_folder()
