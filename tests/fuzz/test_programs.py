"""Random programs: at density 1 sptc computes what eager mode and AOTAutograd do, and no planted region goes unmentioned.

`make fuzz` draws many more. A failing program is shrunk and printed as source that runs.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.differential import Invalid, difference
from tests.fuzz.grammar import Line, Program, Use, Wrap
from tests.fuzz.programs import programs
from tests.fuzz.reduce import reduced
from tests.fuzz.regions import Attention, Ffn

EXAMPLES = int(os.environ.get("FUZZ", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SHARD = 50  # programs of a test: what fails in one does not end the others


def wrong(program: Program) -> str:
    """What is wrong with sptc on a program, and the program as source that runs; empty if nothing is."""
    how = {"dtype": program.dtype, "train": program.train, "input_grad": program.input_grad}
    source, planted = program.render(), program.planted()
    try:
        found, report = difference(source, planted, **how)
    except Invalid:
        return ""
    if not found:
        return ""
    arguments = ", ".join(f"{name}={value!r}" for name, value in how.items())
    run = f"from tests.fuzz.differential import difference\nfound, report = difference(source, {planted}, {arguments})"
    return f"{found}\n{report}\n{program!r}\n\nsource = '''\n{source}'''\n{run}\nprint(found, report, sep='\\n')\n"


def test_a_failing_program_is_made_small():
    """Of a program of many parts what is left is the part that fails."""
    attention, ffn = Attention("lora", "chunk", "softmax", "none", "causal", "none"), Ffn("conv1d", "linear", "gelu", "two", "none")
    part = Wrap("checkpoint", (Line("add_"), Wrap("loop", (Use(attention, False), Use(ffn, True))), Line("noise")))
    program = Program((Use(ffn, True), part, Line("scale")), "dict", "float32", False, True)

    def fails(p: Program) -> bool:
        return "class R" in p.render() and "is_causal" not in p.render() and "softmax(-1)" in p.render() and "checkpoint(self" in p.render()

    small = reduced(program, fails)
    assert small == Program(
        (Wrap("checkpoint", (Use(Attention("linear", "three", "softmax", "none", "none", "none"), True),)),),
        "tensor",
        "float64",
        True,
        False,
    )


ONLY_FLOAT32 = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x, mask):
        y = self.down(torch.relu(self.up(x)))
        return (y * 1e7).sin() + torch.zeros(2, 5, 8).masked_fill(x > 1e9, torch.finfo(x.dtype).min)
"""


def test_what_float64_refuses_is_judged_without_it():
    """What the program amplifies is rounding, of which only a run in float64 could tell."""
    found, _ = difference(ONLY_FLOAT32, {}, dtype="float32", train=True, input_grad=False)
    assert "from eager" in found


@pytest.mark.parametrize("factor, said", [(1.0, False), (1.2, True)])
def test_a_wrong_backend_is_found(monkeypatch, factor, said):
    """Weights of a third take nothing from a fault but what it is by rounding alone."""
    source = ONLY_FLOAT32.replace("(y * 1e7).sin()", "y").replace("torch.finfo(x.dtype).min", "-1e9")

    def compile_graph(gm, inputs, config, inner):
        return lambda *args: [t * factor for t in gm(*args)]

    monkeypatch.setattr("tests.fuzz.differential.compile_graph", compile_graph)
    found, _ = difference(source, {}, dtype="float32", train=True, input_grad=False)
    assert bool(found) == said


@pytest.mark.parametrize("shard", range(max(1, EXAMPLES // SHARD)))
def test_programs(shard):
    @seed(SEED * 100_003 + shard)
    @settings(
        max_examples=min(EXAMPLES, SHARD),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(programs)
    def run(program):
        if wrong(program):
            raise AssertionError(wrong(reduced(program, lambda p: bool(wrong(p)))))

    run()
