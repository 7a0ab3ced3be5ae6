"""`options={"dump": folder}`: what the passes saw and made, as files to read. One subfolder a captured graph: graph0, graph1, ..."""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import networkx as nx
from torch.fx import Node

from sptc.config import Config, ConfigError
from sptc.passes.graph.frame import graphs
from sptc.passes.unit import Unit
from sptc.reports.emit import EmittedKernel
from sptc.reports.report import Report
from sptc.reports.repro import repro

# Which passes leave a graph worth a file, and its name.
_STAGES = {"captured": "00.captured.py", "lower": "01.normalized.py", "rewrite": "02.rewritten.py"}
_COLORS = {"rewritten": "#9fd8a4", "declined": "#f3e29a", "refused": "#eeb0a8", "": "#e4e4e4"}
_BOX = (260, 44)
_GAP = (40, 26)


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
            self._write("graph.svg", draw(unit))

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
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)


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
    """An SVG of the regions in the order of the model: a box each, an arrow where one reaches the next."""
    boxes = list(_boxes(unit))
    graph = _reach([nodes for _, _, nodes in boxes], unit)
    for layer, generation in enumerate(nx.topological_generations(graph)):
        for i in generation:
            graph.nodes[i]["layer"] = layer
    # `multipartite_layout` spreads the boxes of a layer; the positions are read as a grid.
    columns = {i: x for i, (_, x) in nx.multipartite_layout(graph, subset_key="layer").items()} if graph else {}
    rows: dict[int, list[int]] = {}
    for i in sorted(graph, key=lambda i: (columns[i], i)):
        rows.setdefault(graph.nodes[i]["layer"], []).append(i)
    place = {
        i: (column * (_BOX[0] + _GAP[0]) + 20, row * (_BOX[1] + _GAP[1]) + 20) for row, ids in rows.items() for column, i in enumerate(ids)
    }
    width = 40 + max((x for x, _ in place.values()), default=0) + _BOX[0]
    height = 40 + max((y for _, y in place.values()), default=0) + _BOX[1]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">']
    parts.append(
        '<defs><marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    )
    parts += [_arrow(place[a], place[b]) for a, b in graph.edges]
    parts += [_box(place[i], *boxes[i][:2]) for i in graph]
    return "\n".join([*parts, "</svg>"]) + "\n"


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


def _box(at: tuple[int, int], status: str, lines: tuple[str, str]) -> str:
    x, y = at
    text = "".join(f'<text x="{x + 8}" y="{y + 18 + 16 * i}">{html.escape(line)}</text>' for i, line in enumerate(lines))
    return f'<rect x="{x}" y="{y}" width="{_BOX[0]}" height="{_BOX[1]}" rx="4" fill="{_COLORS[status]}" stroke="#555"/>{text}'


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    x = start[0] + _BOX[0] // 2
    return f'<line x1="{x}" y1="{start[1] + _BOX[1]}" x2="{end[0] + _BOX[0] // 2}" y2="{end[1] - 1}" stroke="#555" marker-end="url(#a)"/>'
