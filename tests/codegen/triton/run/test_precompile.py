"""Kernels compiled before they are launched: all at once, each once, and found by whoever compiles them again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from triton import CompilationError, knobs

from sptc.codegen.triton.run import precompile as module
from sptc.codegen.triton.run.aot import build
from sptc.codegen.triton.run.launch import Launch
from sptc.codegen.triton.run.precompile import precompile
from sptc.codegen.triton.target import KNOWN, targeting
from sptc.device import measure

TARGET = KNOWN["sm_90"]
SMALL = ("run_means", "choose_blocks")  # that compile in no time


@pytest.fixture
def launches() -> list[Launch]:
    """Of two sizes that Triton tells apart, each template twice or more."""
    with targeting(TARGET):
        return [launch for launch in measure.launches(torch.device("cuda")) if launch.spec.template in SMALL]


@pytest.fixture(autouse=True)
def nothing_compiled(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_compiled", set())


@pytest.fixture
def hits() -> Iterator[list[bool]]:
    """Whether Triton's cache had what was compiled, one entry for each kernel asked for."""
    found: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
        yield found


def test_measuring_a_gpu_is_told_without_one():
    with targeting(TARGET):
        templates = {launch.spec.template for launch in measure.launches(torch.device("cuda"))}
    assert {"pooled_scores", "encode_histogram", "attention_forward", "attention_backward_q", "attention_backward_kv"} < templates


def test_what_was_compiled_is_found(launches, hits):
    precompile(launches, TARGET)
    assert len(hits) >= len(SMALL) and not any(hits)
    hits.clear()
    for launch in launches:
        build(launch, TARGET)
    assert len(hits) == len(launches) and all(hits)


def test_each_is_compiled_once(launches, monkeypatch):
    built: list[Launch] = []
    monkeypatch.setattr(module, "_compile", lambda launch, target: built.append(launch))
    precompile(launches, TARGET)
    first = len(built)
    assert first < len(launches)
    precompile(launches, TARGET)
    assert len(built) == first
    one = launches[0]
    odd = {name: 3 if isinstance(value, int) else value for name, value in one.arguments.items()}  # an alignment that no other has
    precompile([one, replace(one, arguments=odd)], TARGET)
    assert len(built) == first + 1
    precompile([one], KNOWN["sm_80"])
    assert len(built) == first + 2


@pytest.mark.parametrize(("version", "several"), [((3, 11, 7), False), ((3, 11, 8), True), ((3, 12, 1), False), ((3, 12, 2), True)])
def test_one_thread_where_several_must_not_parse(monkeypatch, version, several):
    monkeypatch.setattr(module.sys, "version_info", version)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(5), raising=False)
    assert module._processors() == (5 if several else 1)


def test_several_at_a_time(launches, monkeypatch):
    meeting = threading.Barrier(2, timeout=60)  # one thread alone would wait in vain
    monkeypatch.setattr(module, "_processors", lambda: 2)
    monkeypatch.setattr(module, "_compile", lambda launch, target: meeting.wait())
    distinct = list({launch.spec: launch for launch in launches}.values())
    precompile(distinct[: len(distinct) // 2 * 2], TARGET)


def test_a_kernel_that_does_not_compile_raises(launches):
    bad = replace(launches[0], arguments=dict.fromkeys(launches[0].arguments, 3))  # numbers where it loads from pointers
    for _ in range(2):  # and is not taken for compiled
        with pytest.raises(CompilationError):
            precompile([bad], TARGET)
