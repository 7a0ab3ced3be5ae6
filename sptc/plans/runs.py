"""Runs of the example batch that tell what sparse forms do to a model's predictions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from tqdm import tqdm

from sptc.ir.hint import optimization_hint
from sptc.ir.region import Counted, LossRegion
from sptc.passes.graph.effects import alias_sets, reads, written_by
from sptc.passes.rewrite.loss import operands, operands_of
from sptc.passes.unit import Unit
from sptc.plans.beside import Beside, Mixed, cuts

_ROWS = 512  # at most, whose predictions are compared
_GROWTH = 2.0  # at least, of what a group adds to the loss, from one density to the next: 2.9 to 11 in SmolLM2 (docs/design/deciding.md)
_SILENT_SECONDS = 2.0


@dataclass(frozen=True)
class _Predictions:
    """Log-probabilities of the classes at rows that count, [rows, classes], and the loss there."""

    logs: Tensor
    loss: float

    @functools.cached_property
    def chances(self) -> Tensor:
        """Probabilities, [rows, classes]."""
        return self.logs.exp()

    @functools.cached_property
    def ruled_out(self) -> Tensor:
        """Classes that have none, bool [rows, classes]."""
        return self.chances == 0

    @property
    def told(self) -> float:
        """What predictions tell of the input, in nats: KL(prediction || their mean), the mean over rows.

        A new head predicts much the same whatever it reads: what is left out beneath it shows in no loss before it has learned.
        """
        return float(_entropy(self.chances.mean(0)) - _entropy(self.chances).mean())


class Runs:
    """Runs of the batch without gradients and dropout: a dense one, and others that share with it what comes before they differ."""

    def __init__(self, unit: Unit, beside: Beside, exact: Mapping[str, float]) -> None:
        """
        Args:
            exact: regions by their keys that have a form at density 1 which all runs take in the dense one's place, as it is faster.
        """
        counted = unit.counted
        assert isinstance(counted, Counted)
        self._unit, self._beside, self._exact = unit, beside, exact
        self._read = _Projected(unit.losses[0]) if unit.losses else _Logits(counted)  # of one cross entropy
        self._inputs = [optimization_hint(x) if isinstance(x, torch.SymInt) else x for x in unit.example_inputs]
        self._devices = sorted({x.device.index for x in self._inputs if isinstance(x, Tensor) and x.is_cuda})
        self.dense = self._predictions(self._run({}))

    def rises(self, settings: Mapping[str, Mapping[float, Mapping[str, float]]], allowed: float) -> dict[tuple[str, float], float]:
        """KL(dense || sparse) of the predictions by group and density.

        Args:
            settings: for each group and density, the densest first, what its regions keep, by their keys.
            allowed: sparser densities of a group that are taken to exceed this alone, by `_GROWTH`, are not tried.
        """
        found: dict[tuple[str, float], float] = {}
        worth = allowed / _GROWTH
        runs = sum(map(len, settings.values()))
        bar = tqdm(total=runs, desc="sptc measures densities", delay=_SILENT_SECONDS, leave=False, unit="run", disable=None)

        def measure(groups: Sequence[str], run: Callable[[Mapping[str, float]], Mixed]) -> None:
            for group in groups:
                for i, (density, kept) in enumerate(settings[group].items()):
                    found[group, density] = _divergence(self.dense, self._predictions(run(kept)))
                    bar.update()
                    if found[group, density] > worth:
                        bar.update(len(settings[group]) - i - 1)
                        break

        starts = self._starts(settings)
        measure(starts.pop(None, []), self._run)
        shared = self._mixed({})
        with bar, torch.no_grad(), torch.random.fork_rng(self._devices), closing(shared.until(starts, *self._inputs)) as stops:
            while starts:
                node = next(stops)
                measure(starts.pop(node), functools.partial(self._resumed, shared, node))
        return found

    def _starts(self, settings: Mapping[str, Mapping[float, Mapping[str, float]]]) -> dict[Node | None, list[str]]:
        """Groups by the node before which their runs are the dense one; None: the first."""
        first = cuts(self._unit, self._beside)
        place = {node: i for i, node in enumerate(self._unit.gm.graph.nodes)}
        starts: dict[Node | None, list[str]] = {}
        for group, by_density in settings.items():
            nodes = [first[key] for kept in by_density.values() for key in kept]
            known = [node for node in nodes if node is not None]
            if nodes:
                start = min(known, key=place.__getitem__) if len(known) == len(nodes) else None
                starts.setdefault(start, []).append(group)
        return starts

    def _mixed(self, densities: Mapping[str, float]) -> Mixed:
        return Mixed(self._unit.gm, self._beside, {**self._exact, **densities}, self._read.nodes, self._read.skipped)

    def _run(self, densities: Mapping[str, float]) -> Mixed:
        mixed = self._mixed(densities)
        with torch.no_grad(), torch.random.fork_rng(self._devices):
            for _ in mixed.until((), *self._inputs):
                pass
        return mixed

    def _resumed(self, prefix: Mixed, node: Node, densities: Mapping[str, float]) -> Mixed:
        mixed = self._mixed(densities)
        mixed.seen.update(prefix.seen)
        with torch.random.fork_rng(self._devices):
            mixed.resume(node, prefix.env)
        return mixed

    def _predictions(self, mixed: Mixed) -> _Predictions:
        with torch.no_grad():
            logits, target = self._read(mixed.seen)
        logs = logits.float().log_softmax(-1)
        return _Predictions(logs, float(-logs.gather(1, target[:, None]).mean()))


class _Logits:
    """Reads logits and labels of rows that count from the logits of all."""

    skipped: Container[Node] = ()

    def __init__(self, counted: Counted) -> None:
        loss = next(user for user in counted.logits.users if counted.target in user.all_input_nodes)
        self.nodes = _settled({counted.logits, counted.target}, loss)
        self._counted = counted

    def __call__(self, values: Mapping[Node, Any]) -> tuple[Tensor, Tensor]:
        target = values[self._counted.target].reshape(-1)
        rows = _rows(target, self._counted.ignored)
        return values[self._counted.logits].movedim(1, -1).flatten(0, -2)[rows], target[rows]


class _Projected:
    """The same from what a loss projects: the logits of other rows, which may be most of a step's memory, are never computed."""

    def __init__(self, region: LossRegion) -> None:
        self.nodes = _settled(operands_of(region), region.y)
        self.skipped = _behind(region.nodes) - set().union(*map(reads, self.nodes))
        self._region = region

    def __call__(self, values: Mapping[Node, Any]) -> tuple[Tensor, Tensor]:
        o = operands(self._region, values)
        rows = _rows(o.labels, self._region.ignored)
        with torch.autocast(o.x.device.type, enabled=False):  # which the run that this one shares may be stopped in
            return o.logits(rows), o.labels[rows]


def _settled(nodes: Iterable[Node], loss: Node) -> frozenset[Node]:
    """Nodes, and what writes to their memory before the loss reads it: their values are what they hold behind all of these."""
    found = frozenset(nodes)
    writes = [(node, target) for node in loss.graph.nodes if node < loss for target in written_by(node)]
    aliases = alias_sets(loss.graph) if writes else {}
    held = {aliases[node] for node in found if writes}
    return found | {node for node, target in writes if aliases[target] in held}


def _behind(nodes: Iterable[Node]) -> set[Node]:
    """Nodes, and what is computed from them."""
    waiting = list(nodes)
    found = set(waiting)
    while waiting:
        fresh = [user for user in waiting.pop().users if user not in found]
        found.update(fresh)
        waiting += fresh
    return found


def _rows(labels: Tensor, ignored: int) -> Tensor:
    """Rows whose label counts, not more than `_ROWS`, spread evenly."""
    rows = (labels != ignored).nonzero().squeeze(1)
    taken = min(len(rows), _ROWS)
    return rows[torch.arange(taken, device=rows.device) * len(rows) // max(1, taken)]


def _entropy(chances: Tensor) -> Tensor:
    return -torch.special.xlogy(chances, chances).sum(-1)


def _divergence(dense: _Predictions, sparse: _Predictions) -> float:
    """KL(dense || sparse), the mean over rows; infinite where the sparse model predicts nothing.

    A class that the dense model rules out (a logit of -inf) has no part in it.
    """
    terms = (dense.logs - sparse.logs).mul_(dense.chances).masked_fill_(dense.ruled_out, 0.0)
    rise = float(terms.sum(-1).mean())
    return math.inf if math.isnan(rise) else max(0.0, rise)
