"""`options={"dump": folder}`: what the passes saw and made, as files to read. One subfolder a captured graph: graph0, graph1, ..."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import networkx as nx
from torch.fx import Node

from sptc.config import Config, ConfigError
from sptc.device.cache import write_whole
from sptc.passes.graph.frame import graphs
from sptc.passes.unit import Unit
from sptc.reports.emit import EmittedKernel
from sptc.reports.report import Report
from sptc.reports.repro import repro

# Which passes leave a graph worth a file, and its name.
_STAGES = {"captured": "00.captured.py", "lower": "01.normalized.py", "rewrite": "02.rewritten.py"}
_COLORS = {"rewritten": "#9fd8a4", "declined": "#f3e29a", "refused": "#eeb0a8"}


class Dump:
    """Observes one graph on its way through the passes and writes what a stage left; every file appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, config: Config) -> Dump | None:
        """A new subfolder of `config.dump`, or None if no dump was asked for.

        Raises:
            ConfigError: the folder cannot be made or written to. Nothing was compiled yet.
        """
        if config.dump is None:
            return None
        base = Path(config.dump)
        try:
            base.mkdir(parents=True, exist_ok=True)
            return cls(_new_folder(base))
        except OSError as error:
            raise ConfigError(f"option 'dump': cannot write to {str(base)!r}: {error.strerror or error}") from error

    def __call__(self, name: str, unit: Unit) -> None:
        """Called after each pass, and with "captured" before the first."""
        if name in _STAGES:
            code = unit.gm.print_readable(print_output=False, include_stride=True, include_device=True)
            self._write(_STAGES[name], code.replace("class <lambda>(", "class GraphModule(").strip() + "\n")  # tracing's name is no Python
        if name == "captured":
            self._write("repro.py", repro(unit.gm, unit.example_inputs, unit.config.to_options()))
        if name == "decide":  # the graph still holds the regions' nodes
            self._write("regions.md", draw(unit))

    def report(self, report: Report) -> None:
        self._write("report.txt", str(report) + "\n")
        self._write("regions.json", json.dumps(report.to_dict(), indent=1) + "\n")

    def kernels(self, kernels: Sequence[EmittedKernel]) -> None:
        """Each kernel in a file named after its template, numbered where a template makes several."""
        total, seen = Counter(kernel.spec.template for kernel in kernels), Counter[str]()
        for kernel in kernels:
            name = kernel.spec.template
            seen[name] += 1
            self._write(f"kernels/{name}.py" if total[name] == 1 else f"kernels/{name}_{seen[name]}.py", kernel.source)

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, text)
        path.chmod(0o644)  # for whoever reads the folder; the cache's own files are private


def _new_folder(base: Path) -> Path:
    """The first of graph0, graph1, ... that does not exist; another process may be taking them too."""
    number = 0
    while True:
        folder = base / f"graph{number}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def draw(unit: Unit) -> str:
    """The regions in the order of the model as a Mermaid chart: a box each, an arrow where one reaches the next."""
    boxes = list(_boxes(unit))
    edges = _reach([nodes for _, _, nodes in boxes], unit).edges
    chart = ["flowchart TD", *(f"    classDef {status} fill:{color},stroke:#555" for status, color in _COLORS.items())]
    chart += [f'    r{i}["{html.escape(place)}<br>{html.escape(what)}"]:::{status}' for i, (status, (place, what), _) in enumerate(boxes)]
    return "\n".join(["```mermaid", *chart, *(f"    r{a} --> r{b}" for a, b in edges), "```"]) + "\n"


def _boxes(unit: Unit) -> Iterator[tuple[str, tuple[str, str], frozenset[Node]]]:
    """(status, two lines of text, nodes) of each region and refusal in the order of the model."""
    found: list[tuple[Node, str, tuple[str, str], frozenset[Node]]] = []
    for d in unit.decisions:
        status = "rewritten" if d.rewrite else "declined"
        found.append((d.region.y, status, (d.region.site.module or "(root)", f"{d.region.kind} {status}"), d.region.nodes))
    for r in unit.refusals:
        found.append((r.node, "refused", (r.site.module or "(root)", f"{r.kind} refused: {r.rule}"), frozenset({r.node})))
    order = {gm.graph: position for position, gm in enumerate(graphs(unit.gm))}
    found.sort(key=lambda row: (order.get(row[0].graph, 0), row[0]._sort_key))
    yield from (row[1:] for row in found)


def _reach(groups: list[frozenset[Node]], unit: Unit) -> nx.DiGraph:
    """Which group's values reach which other without passing through a third; bodies of checkpoints are chained in their order."""
    owner = {node: i for i, nodes in enumerate(groups) for node in nodes}
    edges = nx.DiGraph()
    edges.add_nodes_from(range(len(groups)))
    last: set[int] = set()
    for gm in graphs(unit.gm):
        reaching: dict[Node, set[int]] = {}
        inside: set[int] = set()
        for node in gm.graph.nodes:
            sources = set().union(*(reaching[n] for n in node.all_input_nodes)) if node.all_input_nodes else set()
            group = owner.get(node)
            if group is not None:
                edges.add_edges_from((a, group) for a in sources if a < group)
                sources, inside = {group}, inside | {group}
            reaching[node] = sources
        starts = {i for i in inside if not edges.in_degree(i)}
        edges.add_edges_from((a, b) for a in last for b in starts if a < b)
        if inside:
            last = {i for i in inside if not edges.out_degree(i)}
    return nx.transitive_reduction(edges)
