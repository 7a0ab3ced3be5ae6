"""Random programs: at density 1 sptc computes what eager mode and AOTAutograd do, and no planted region goes unmentioned.

`make fuzz` draws many more. A failing program is shrunk and printed as source that runs.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings

from tests.fuzz.differential import Invalid, difference
from tests.fuzz.grammar import Program
from tests.fuzz.programs import programs

EXAMPLES = int(os.environ.get("FUZZ", "100"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SHARD = 50  # programs of a test: what fails in one does not end the others


def check(program: Program) -> None:
    """Raises an AssertionError that holds a runnable program if sptc differs."""
    how = {"dtype": program.dtype, "train": program.train, "input_grad": program.input_grad}
    source, planted = program.render(), program.planted()
    try:
        found, report = difference(source, planted, **how)
    except Invalid:
        assume(False)
    if found:
        arguments = ", ".join(f"{name}={value!r}" for name, value in how.items())
        run = f"from tests.fuzz.differential import difference\nfound, report = difference(source, {planted}, {arguments})"
        raise AssertionError(f"{found}\n{report}\n{program!r}\n\nsource = '''\n{source}'''\n{run}\nprint(found, report, sep='\\n')\n")


@pytest.mark.parametrize("shard", range(max(1, EXAMPLES // SHARD)))
def test_programs(shard):
    @seed(SEED * 100_003 + shard)
    @settings(
        max_examples=min(EXAMPLES, SHARD),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(programs)
    def run(program):
        check(program)

    run()
