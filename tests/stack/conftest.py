"""Cells need packages that other tests do not; what became of each cell is written down for docs/stack.md."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stack.fresh import fresh

PLACE = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stack")
    group.addoption("--stack-results", metavar="FILE", help="write a line of JSON for each cell of the fine-tuning stack")
    group.addoption("--stack-complete", action="store_true", help="a missing package is an error, not a reason to skip")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--stack-results", None)
    if path is not None and not hasattr(config, "workerinput"):  # workers hand their reports to the process that started them
        config.pluginmanager.register(Results(Path(path)), "stack-results")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        (package,) = mark.args
        if importlib.util.find_spec(package) is None:
            sentence = f"{package} is not installed; `pip install 'sptc[stack]'` brings it"
            pytest.fail(sentence) if item.config.getoption("--stack-complete", False) else pytest.skip(sentence)


@pytest.hookimpl(tryfirst=True)  # before any are left out by name or mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A cell's place in its group is that of the whole suite, however few cells run."""
    names: dict[str, list[str]] = {}
    for item in items:
        for mark in item.iter_markers("cell"):
            group, name = mark.args
            known = names.setdefault(group, [])
            if name not in known:
                known.append(name)
            item.stash[PLACE] = known.index(name)


@pytest.fixture(autouse=True)
def process_of_its_own() -> Iterator[None]:
    """No cell sees what another one left, whichever came before; `run_script` does the same for each run of a cell."""
    with fresh():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Group, name and place travel with the report, since workers send only reports."""
    report = yield
    mark = item.get_closest_marker("cell")
    if mark is not None:
        report.user_properties.append(("cell", (*mark.args, item.stash[PLACE])))
    return report


class Results:
    """Writes a line for each cell as it ends."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        facts = dict(report.user_properties)
        ended = report.when == "call" or (report.when == "setup" and not report.passed)
        if ended and "cell" in facts:
            group, name, order = facts.pop("cell")
            line = {"group": group, "name": name, "order": order, "outcome": report.outcome, **facts}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def pytest_unconfigure(self) -> None:
        self.file.close()
