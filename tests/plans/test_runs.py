"""What is read of a run: predictions at rows that count, from the logits of all rows or of these alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sptc.plans import beside, runs
from tests.models.compiled import without_inductor
from tests.plans.measured import CLASSES, D, Model, batch

OPTIONS = {"decline": "never", "attention.enabled": False, "max_rise": 1e6}


class Shifted(Model):
    """Labels of the next tokens, computed behind the logits, which are returned."""

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = self.logits(ids)
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten()), logits


class Cut(Model):
    """The last position of each sequence has no label, and logits are capped."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = 3.0 * torch.tanh(self.logits(ids) / 3.0)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Adapted(Model):
    """A head with an adapter, in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, CLASSES, bias=False)

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for ffn in self.ffns:
            x = x + ffn(x)
            x = x + self.mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(x) + self.b(self.a(x)) * 2.0


@pytest.mark.parametrize("model, tolerance", [(Model, 1e-5), (Shifted, 1e-5), (Cut, 1e-5), (Adapted, 0.05)])
def test_logits_of_rows_that_count_are_those_of_all(model: type[Model], tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[float, Mapping[Any, float]]] = []
    widest: list[int] = []
    rises, run_node = runs.Runs.rises, beside.Mixed.run_node

    def recorded(self: runs.Runs, settings: Any, allowed: float) -> Any:
        assert isinstance(self._read, runs._Projected)
        whole = runs.Runs(replace(self._unit, losses=()), self._beside, {})
        assert isinstance(whole._read, runs._Logits)
        found.append((whole.dense.loss, rises(whole, settings, allowed)))
        widest.clear()
        found.append((self.dense.loss, rises(self, settings, allowed)))
        return found[-1][1]

    def seen(self: beside.Mixed, node: Any) -> Any:
        result = run_node(self, node)
        if isinstance(result, Tensor) and result.dim() and result.shape[-1] == CLASSES and node.op != "placeholder":
            widest.append(result.numel())
        return result

    monkeypatch.setattr(runs.Runs, "rises", recorded)
    monkeypatch.setattr(beside.Mixed, "run_node", seen)
    ids, labels = batch(counted=0.5)
    torch.compile(model(), backend=without_inductor(**OPTIONS))(ids, labels)
    (loss, whole), (other, rows) = found
    assert not widest  # no logits in the graph's own runs
    assert other == pytest.approx(loss, rel=tolerance) and whole.keys() == rows.keys() and len(rows) == 4
    for key, rise in rows.items():
        assert rise == pytest.approx(whole[key], rel=5 * tolerance, abs=tolerance / 10) and rise > 0


class Faded(Model):
    """What is projected is changed in place, by way of a view."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids)
        for ffn in self.ffns:
            x = x + ffn(x)
            x = self.mixer(x) * 1.0
        x[..., : D // 2].mul_(0.1)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels)


class Ruled(Model):
    """Logits of a class are ruled out in place, so that no operator is put in the loss's place."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.logits(ids).flatten(0, 1) * 2.0
        logits[..., CLASSES - 1] = -1e4
        return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("model, read", [(Faded, runs._Projected), (Ruled, runs._Logits)])
def test_predictions_are_read_behind_what_is_written_to_them(model: type[Model], read: type, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    rises = runs.Runs.rises

    def recorded(self: runs.Runs, settings: Any, allowed: float) -> Any:
        assert isinstance(self._read, read)
        found.append(self.dense.loss)
        return rises(self, settings, allowed)

    monkeypatch.setattr(runs.Runs, "rises", recorded)
    ids, labels = batch(counted=0.5)
    loss = torch.compile(model(), backend=without_inductor(**{**OPTIONS, "max_rise": 1e-9}))(ids, labels.clamp(max=CLASSES - 2).flatten())
    assert found == [pytest.approx(loss.item(), rel=1e-4)]
