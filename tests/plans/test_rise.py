"""FFN densities by measurement: what is measured, what is chosen, and when nothing can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sptc
from sptc.config import Config
from sptc.model.capture import capture
from sptc.passes import ANALYSIS
from sptc.passes.runner import run
from sptc.passes.unit import Unit
from sptc.plans import beside, rise, runs
from tests.models.compiled import without_inductor
from tests.planning_device import DEVICE
from tests.plans.measured import HIDDEN, D, Ffn, Model, batch

OPTIONS = {"decline": "never", "attention.enabled": False, "max_rise": 0.02}


def densities(compiled: Any) -> list[float]:
    return [r.density for r in sptc.report(compiled).regions if r.kind == "ffn"]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many regions each measurement was of."""
    seen: list[int] = []
    measure = rise._measure
    monkeypatch.setattr(rise, "_measure", lambda unit, regions: (seen.append(len(regions)), measure(unit, regions))[1])
    return seen


@pytest.mark.parametrize("counted, least", [(1.0, 0.5), (0.4, 0.125)])
def test_what_the_model_needs_stays_and_what_it_does_not_goes(counted: float, least: float, measurements: list[int]) -> None:
    model = Model()
    compiled = torch.compile(model, backend=without_inductor(**OPTIONS))
    compiled(*batch(counted=counted)).backward()
    kept = densities(compiled)
    assert kept[0] > kept[1] == least
    assert all("measured" in r.reason for r in sptc.report(compiled).regions if r.kind == "ffn")
    assert all(p.grad is not None for p in model.parameters())
    for length in (9, 17):  # graphs for other lengths take what was chosen
        compiled(*batch(length, counted)).backward()
    assert measurements == [2] and set(densities(compiled)) == set(kept)
    torch._dynamo.reset()
    again = torch.compile(Model(), backend=without_inductor(**OPTIONS))
    again(*batch(counted=counted))
    assert measurements == [2, 2] and densities(again) == kept  # another model is measured for itself


@pytest.mark.parametrize("allowed, expected", [(0.0, [1.0, 1.0]), (1e6, [0.5, 0.5])])
def test_max_rise_is_the_limit(allowed: float, expected: list[float]) -> None:
    compiled = torch.compile(Model(), backend=without_inductor(**{**OPTIONS, "max_rise": allowed}))
    compiled(*batch())
    assert densities(compiled) == expected


def test_the_rise_is_the_divergence_at_the_tokens_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    divergence = runs._divergence
    monkeypatch.setattr(runs, "_divergence", lambda *args: (seen.append(divergence(*args)), seen[-1])[1])
    model, (ids, labels) = Model(), batch(counted=0.4)
    torch.compile(model, backend=without_inductor(**{**OPTIONS, "max_rise": 1e6}))(ids, labels)
    torch._dynamo.reset()

    logits: list[Tensor] = []
    head = model.head.register_forward_hook(lambda _, args, out: logits.append(out.detach()))
    with torch.no_grad():
        model(ids, labels)
        for density in (1 / 2, 1 / 8):  # of the first FFN alone
            _Only(model, density)(ids, labels)
    head.remove()
    rows = (labels != -100).flatten()
    dense, *sparse = [out.flatten(0, 1)[rows].double().log_softmax(-1) for out in logits]
    expected = [float((dense.exp() * (dense - s)).sum(-1).mean()) for s in sparse]
    assert seen[: len(expected)] == pytest.approx(expected, rel=1e-3)


class _Only(nn.Module):
    """The model with units of the first FFN left out for the context, by a definition of its own."""

    def __init__(self, model: Model, density: float) -> None:
        super().__init__()
        self.model, self.units = model, round(density * HIDDEN)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        from sptc.codegen.ops.units import sample_tokens

        m = self.model
        context = (labels == -100).flatten()
        x = m.tokens(ids)
        h = F.gelu(m.ffns[0].up(x)).flatten(0, 1)
        energy = h[sample_tokens(context, context)].square().sum(0) * m.ffns[0].down.weight.square().sum(0)
        kept = torch.zeros(HIDDEN).index_fill(0, energy.topk(self.units).indices, 1.0)
        y = m.ffns[0].down(torch.where(context[:, None], h * kept, h)).view_as(x)
        x = x + y
        x = x + m.mixer(x)
        x = x + m.ffns[1](x)
        return m.head(x + m.mixer(x))


class OneClassMore(Model):
    """As vocabularies that are padded: no token may be of it."""

    def logits(self, ids: Tensor) -> Tensor:
        return F.pad(super().logits(ids), (0, 1), value=-torch.inf)


def test_a_class_that_is_ruled_out_hides_no_rise() -> None:
    """0 times what is not finite is no number, and no number is no rise of 0."""
    kept = []
    for model in (Model(), OneClassMore()):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=without_inductor(**OPTIONS))
        compiled(*batch())
        kept.append(densities(compiled))
    assert kept[0] == kept[1] == [1.0, 0.5]


def test_predictions_that_are_no_numbers_are_beyond_any_limit() -> None:
    logs = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]]).log()
    dense, shifted, broken = (runs._Predictions(x, 1.0) for x in (logs, logs.roll(1, 0), torch.where(logs.isinf(), torch.nan, logs)))
    broken.logs[1] = torch.nan
    assert runs._divergence(dense, dense) == 0.0 and 0.0 < runs._divergence(dense, shifted) < 1.0
    assert runs._divergence(dense, broken) == runs._divergence(shifted, broken) == torch.inf


class Overflows(Model):
    def logits(self, ids: Tensor) -> Tensor:
        return super().logits(ids) * torch.inf


@pytest.mark.parametrize(
    "model, counted, says", [(Model, 0.0, "nan, since no label of it counts"), (Overflows, 1.0, "loss of the batch is nan")]
)
def test_a_batch_without_a_finite_loss_tells_nothing_and_the_next_one_may(
    model: type[Model], counted: float, says: str, measurements: list[int]
) -> None:
    compiled = torch.compile(model(), backend=without_inductor(**OPTIONS, **{"ffn.context_density": None}))
    assert compiled(*batch(counted=counted)).isnan()
    assert densities(compiled) == [1.0, 1.0] and all(says in r.reason for r in sptc.report(compiled).regions if r.kind == "ffn")
    compiled(*batch(17))
    assert len(measurements) == 2 and (min(densities(compiled)) < 1.0) == (model is Model)


class NoLoss(Model):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.logits(ids)


class Counting(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(ids, labels)


@pytest.mark.parametrize("model, says", [(NoLoss, "no cross entropy"), (Counting, "writes to its inputs")])
def test_without_a_measurement_ffns_stay_whole_and_say_so(model: type[Model], says: str) -> None:
    compiled = torch.compile(made := model(), backend=without_inductor(**OPTIONS))
    compiled(*batch())
    assert densities(compiled) == [1.0, 1.0]
    assert all(
        says in r.reason and "set attention.density and ffn.density" in r.reason for r in sptc.report(compiled).regions if r.kind == "ffn"
    )
    if model is Counting:
        assert int(made.calls) == 1


def test_explaining_changes_nothing(measurements: list[int]) -> None:
    model = Model()
    random = torch.get_rng_state()
    report = sptc.explain(model, batch(), OPTIONS)
    assert torch.equal(torch.get_rng_state(), random)
    compiled = torch.compile(model, backend=without_inductor(**OPTIONS))
    compiled(*batch())
    assert measurements == [2, 2] and densities(compiled) == [r.density for r in report.regions if r.kind == "ffn"]


def test_the_memory_of_the_runs_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(rise, "give_back", lambda: calls.append(True))
    sptc.explain(Model(), batch(), OPTIONS)
    assert calls == [True]


def test_deep_models_are_measured_in_groups() -> None:
    units: list[Unit] = []
    model = nn.Sequential(*(Ffn() for _ in range(30)))
    config = Config.from_options(OPTIONS)
    capture(model, torch.randn(2, 3, D), lambda gm, inputs: units.append(run(Unit(gm, tuple(inputs), config, DEVICE), ANALYSIS)))
    (unit,) = units
    groups = rise.grouped(unit, unit.regions)
    assert [region for group in groups for region in group] == list(unit.regions) and len(unit.regions) == 30
    assert len(groups) <= 12 and len(groups[0]) == 1 and {len(group) for group in groups[1:-1]} == {3}
    assert [len(group) for group in rise.grouped(unit, unit.regions[:5])] == [1] * 5


def test_another_limit_is_another_choice() -> None:
    """What was chosen for a model under one limit is not taken under another: with none allowed, the forward pass is dense."""
    model = Model()
    for allowed, expected in ((1e6, [0.5, 0.5]), (0.0, [1.0, 1.0])):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=without_inductor(**{**OPTIONS, "max_rise": allowed}))
        compiled(*batch())
        assert densities(compiled) == expected


class Twice(Model):
    """One FFN in two places, of which the second bears what the first does not."""

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = self.mixer(x + self.ffns[0](x))
        return self.head(x + 1e-5 * self.ffns[0](x))


class Unprojected(Model):
    """Attention whose queries no matrix projects but that of the FFN before, which adds next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.ffns[1].down.weight *= 1e-4  # type: ignore[union-attr, operator]

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = self.ffns[1](x) + x
        heads = x[:, None]
        return self.head(x + 10 * F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0])


@pytest.mark.parametrize("model, needs", [(Twice, "ffn"), (Unprojected, "attention")])
def test_a_matrix_of_two_regions_is_remembered_by_what_needs_most(model: type[Model], needs: str, measurements: list[int]) -> None:
    options = {**OPTIONS, "attention.enabled": True, "attention.query_block": 4, "attention.key_block": 4, "max_rise": 1e-5}
    compiled = torch.compile(model(), backend=without_inductor(**options))
    compiled(*batch(64))
    least, most = sorted((r.density, r.kind) for r in sptc.report(compiled).regions if r.kind != "loss")
    assert most == (1.0, needs) and least[0] < 1.0
    compiled(*batch(48))
    both = [(r.density, r.kind) for r in sptc.report(compiled).regions if r.kind != "loss"]
    assert measurements == [2] and len(both) == 4
    assert all(density == 1.0 for density, kind in both[2:] if kind == needs), both


class Noisy(Model):
    """Random numbers, layers that are recomputed, the most of it under autocast, and where asked a write to what others read."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def logits(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        with torch.autocast("cpu", torch.bfloat16):
            for ffn in self.ffns:
                x = x + checkpoint(ffn, x, use_reentrant=False)
                x = x + self.mixer(x) + 0.1 * torch.randn_like(x)
                if self.writes:
                    x.mul_(1.5)
        return self.head(x.float())


@pytest.mark.parametrize("writes", [False, True])
def test_runs_that_share_their_beginning_find_what_whole_runs_find(writes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[tuple[str, float], float]] = []
    rises = runs.Runs.rises

    def recorded(self: runs.Runs, settings: Any, allowed: float) -> Any:
        started = [node is not None for node in self._starts(settings)]
        assert started == ([False] if writes else [True, True])
        shared = rises(self, settings, allowed)
        assert not torch.is_autocast_enabled("cpu")
        monkeypatch.setattr(runs, "cuts", lambda unit, beside: dict.fromkeys(key for key, _ in beside.owner.values()))
        found.extend([shared, rises(self, settings, allowed)])
        return shared

    monkeypatch.setattr(runs.Runs, "rises", recorded)
    compiled = torch.compile(Noisy(writes), backend=without_inductor(**{**OPTIONS, "max_rise": 1e6}))
    compiled(*batch()).backward()
    shared, whole = found
    assert shared == whole and len(shared) == 4 and all(rise > 0 for rise in shared.values())


@pytest.mark.parametrize("products", [1, 6, 9, 11])
def test_a_measurement_that_fails_leaves_no_autocast_open(products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the cache of autocast is never cleared again, and what trains under it goes on with the weights of that moment."""
    ran: list[int] = []
    call = beside.Mixed.call_function

    def interrupted(self: beside.Mixed, target: Any, *rest: Any) -> Any:
        if target is torch.ops.aten.linear.default:
            ran.append(1)
            if len(ran) == products:  # of the whole run, before, under and behind autocast, and of a run that shares its beginning
                raise KeyboardInterrupt
        return call(self, target, *rest)

    monkeypatch.setattr(beside.Mixed, "call_function", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch.compile(Noisy(writes=False), backend=without_inductor(**{**OPTIONS, "max_rise": 1e6}))(*batch())
    outermost = torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()
    assert outermost and not torch.is_autocast_enabled("cpu") and len(ran) == products


class WithAnotherHead(Model):
    """An FFN that no prediction depends on, by a value or by way of memory, gives the model's second result."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.tokens(ids)
        first = self.ffns[0](x)
        if self.writes:
            x = torch.zeros_like(x).copy_(first) + x
        else:
            x = x + first
        loss = F.cross_entropy(self.head(x + self.mixer(x)).flatten(0, 1), labels.flatten())
        return loss, self.ffns[1](x)


@pytest.mark.parametrize("writes", [False, True])
def test_what_predictions_do_not_depend_on_is_not_measured_by_them(writes: bool, measurements: list[int]) -> None:
    model = WithAnotherHead(writes)
    compiled = torch.compile(model, backend=without_inductor(**{**OPTIONS, "max_rise": 1e6}))
    compiled(*batch())
    assert densities(compiled) == [0.5, 1.0] and measurements == [1]
    reasons = [r.reason for r in sptc.report(compiled).regions if r.kind == "ffn"]
    assert ["the cross entropy does not depend on it" in reason for reason in reasons] == [False, True]


@pytest.mark.parametrize(
    "scale, says", [(1e-2, "nats that its predictions tell"), (1e-5, "as those of a new head"), (0.0, "as those of a new head")]
)
def test_a_head_that_tells_nothing_yet_allows_nothing(scale: float, says: str) -> None:
    """Its logits differ by next to nothing, and so do those of the sparsest model; once it is trained they would not."""
    model, (ids, labels) = Model(), batch()
    with torch.no_grad():
        model.head.weight *= scale
        model.head.bias.zero_()
    compiled = torch.compile(model, backend=without_inductor(**{**OPTIONS, "max_rise": 1e-4}))
    compiled(ids, labels)
    assert densities(compiled) == [1.0, 1.0] and says in sptc.report(compiled).regions[0].reason


def test_what_is_sparser_than_too_sparse_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    divergence = runs._divergence
    monkeypatch.setattr(runs, "_divergence", lambda *args: (tried.append(divergence(*args)), tried[-1])[1])
    compiled = torch.compile(Model(), backend=without_inductor(**OPTIONS))
    compiled(*batch())
    assert densities(compiled) == [1.0, 0.5] and len(tried) == 3  # 3/4 of the first, and both of the second


@pytest.mark.parametrize("share, runs_of_both", [(0.4, 4), (0.6, 2)])
def test_what_takes_most_of_the_limit_is_not_thinned_further(share: float, runs_of_both: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rise is taken to double from one density to the next."""
    tried: list[float] = []
    monkeypatch.setattr(
        runs, "_divergence", lambda dense, _: (tried.append(share * OPTIONS["max_rise"] * min(dense.loss, dense.told)), tried[-1])[1]
    )
    torch.compile(Model(), backend=without_inductor(**OPTIONS))(*batch())
    assert len(tried) == runs_of_both


def test_what_pays_when_sparser_only_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """3/4 of the first FFN's units is what the loss allows, and the overhead of choosing them is more than a quarter."""
    found: list[dict[tuple[str, float], float]] = []
    dense: list[Any] = []
    rises = runs.Runs.rises
    monkeypatch.setattr(runs.Runs, "rises", lambda run, *args: (dense.append(run.dense), found.append(rises(run, *args)), found[-1])[2])
    ids, labels = batch()
    compiled = torch.compile(Model(), backend=without_inductor(**{**OPTIONS, "max_rise": 1e6}))
    compiled(ids, labels)
    (mild, harsh) = (rise for (key, _), rise in found[0].items() if key.startswith("ffns.0"))
    allowed = {"max_rise": (mild * harsh) ** 0.5 / min(dense[0].loss, dense[0].told), "decline": "auto"}
    regions = {}
    for overhead in (0.0, 4e-6):
        torch._dynamo.reset()
        monkeypatch.setattr("sptc.backend.calibrate", lambda *_, overhead=overhead: replace(DEVICE, op_seconds=overhead))
        compiled = torch.compile(Model(), backend=without_inductor(**{**OPTIONS, **allowed}))
        compiled(ids, labels)
        regions[overhead] = {r.module: r for r in sptc.report(compiled).regions if r.kind == "ffn"}
    free, dear = (regions[overhead]["ffns.0"] for overhead in (0.0, 4e-6))
    assert (free.status, free.density) == ("rewritten", 0.75) and free.reason.startswith("pays: ")
    assert (dear.status, dear.density) == ("declined", 1.0) and "at density 0.75 it would not pay" in dear.reason
    assert regions[4e-6]["ffns.1"].density == 0.5
