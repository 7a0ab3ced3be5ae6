"""Reports as data and as text, and how they are found again on what was compiled."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import sptc
from sptc.reports.explain import explain
from tests.models.compiled import without_inductor
from tests.models.zoo import CASES


class Ffn(nn.Module):
    def __init__(self, size: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(size, hidden)
        self.down = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Broken(nn.Module):
    """Two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Ffn(), Ffn(hidden=32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class BrokenAround(nn.Module):
    """A method of its own that a graph break parts from `forward`: inside an autocast block Dynamo runs `forward` itself eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Ffn()

    def part(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.part(x * 1)


NEVER = {"decline": "never", "ffn.density": 0.5}


def test_graphs_of_a_modules_other_methods_are_in_the_report():
    compiled = torch.compile(BrokenAround(), backend=without_inductor(**NEVER))
    with torch.no_grad():
        compiled(torch.randn(2, 5, 16))
    assert [r.module for r in sptc.report(compiled).regions] == ["first"]


ROUTER = {"ffn.selector": "router"}
X = torch.randn(5, 16)


def modules(report: sptc.Report) -> list[str]:
    return [region.module for region in report.regions]


def test_a_row_a_region_in_the_order_of_the_model():
    model, inputs = CASES["bert-sdpa-padded"].make()
    report = explain(model, inputs, {**NEVER, "ffn.blocks": 8})
    kinds = [region.kind for region in report.regions]
    assert kinds[:4] == ["attention", "ffn", "attention", "ffn"]
    assert all("layer.0" in name for name in modules(report)[:2]) and all("layer.1" in name for name in modules(report)[2:4])
    text = str(report)
    for region in report.regions:
        assert region.module in text and region.source.split(":")[0].endswith(".py")
    assert "total" in text and f"4 of {len(kinds)} regions rewritten" in text and "passes: lower" in text


def test_data_is_plain_and_adds_up():
    report = explain(Broken(), X, {**NEVER, "ffn.enabled": True})
    data = json.loads(json.dumps(report.to_dict()))
    assert data["graphs"] == 2 and [r["graph"] for r in data["regions"]] == [0, 1]
    assert data["totals"]["flops_before"] == sum(r["flops_before"] for r in data["regions"]) > 0
    assert data["totals"]["flops_after"] == sum(r["flops_after"] for r in data["regions"])
    common = {"context": None, "gradients_only": False, "rows": "all", "recompute": False, "chunk": None, "rank": 0}
    assert [r["settings"] for r in data["regions"]] == [{"hidden": 64, "units": 32, **common}, {"hidden": 32, "units": 16, **common}]
    assert [p["name"] for p in data["passes"]] == ["lower", "find", "bind", "decide", "weigh_alone"]


def test_statuses():
    model = nn.Sequential(Ffn(), Ffn(hidden=36))
    report = explain(model, X, ROUTER)
    declined, refused = report.regions
    assert (declined.status, declined.density, declined.flops_after) == ("declined", 1.0, declined.flops_before)
    assert "sparse" in declined.reason and "dense" in declined.reason and declined.seconds_sparse > declined.seconds_dense
    assert (refused.status, refused.rule, refused.flops_before) == ("refused", "blocks", None)
    assert "[blocks]" in str(report)
    (rewritten,) = explain(Ffn(), X, NEVER).regions
    assert (rewritten.status, rewritten.density) == ("rewritten", 0.5) and rewritten.flops_after < rewritten.flops_before
    assert rewritten.computes == "relu"
    assert "no attention or FFN region in 1 graph" in str(explain(nn.Linear(16, 3), X))


def test_notes_name_what_prepare_would_add_and_frozen_routers():
    model = nn.Sequential(Ffn(), nn.Tanh())
    (note,) = explain(model, X, {**NEVER, **ROUTER}).notes
    assert "sptc.prepare" in note and "routers" in note
    sptc.prepare(model, X, {**NEVER, **ROUTER})
    assert explain(model, X, {**NEVER, **ROUTER}).notes == ()
    model[0].spt.requires_grad_(False)
    (note,) = explain(model, X, {**NEVER, **ROUTER}).notes
    assert "the router of 0 is frozen" in note


def compiled(model, options=NEVER, backend=None):
    result = torch.compile(model, backend=backend or without_inductor(**options))
    result(X)
    return result


def test_the_report_of_torch_compile_and_of_model_compile():
    wrapped = compiled(Broken())
    report = sptc.report(wrapped)
    assert modules(report) == ["first", "second"] and report.graphs == 2
    assert {region.status for region in report.regions} == {"rewritten"}

    model = Ffn(hidden=48)
    model.compile(backend=without_inductor(**NEVER))
    model(X)
    assert [r.flops_before for r in sptc.report(model).regions] == [r.flops_before for r in explain(model, X).regions]


def test_the_report_of_a_function_and_of_a_container():
    model = Ffn()

    def step(x: Tensor) -> Tensor:
        return model(x).sum()

    assert len(sptc.report(compiled(step)).regions) == 1
    assert len(sptc.report(compiled(nn.Sequential(Ffn(), Ffn()))).regions) == 2


def test_models_and_compiles_are_told_apart():
    small, large = compiled(Ffn(hidden=32)), compiled(Ffn(hidden=64))
    dense = compiled(large._orig_mod, {"ffn.enabled": False})
    flops = [sptc.report(m).regions[0].flops_before for m in (small, large)]
    assert flops[1] == 2 * flops[0]
    assert [sptc.report(m).regions[0].status for m in (large, dense)] == ["rewritten", "declined"]
    assert all(len(sptc.report(m).regions) == 1 for m in (small, large, dense))


def test_code_that_dynamo_shares_between_instances_is_found_from_both():
    backend = without_inductor(**NEVER)
    first, second = compiled(Ffn(), backend=backend), compiled(Ffn(), backend=backend)
    assert sptc.report(first) == sptc.report(second)


def test_recompiles_add_graphs():
    wrapped = compiled(Ffn())
    wrapped(torch.randn(2, 3, 16))
    assert sptc.report(wrapped).graphs == 2


def test_nothing_compiled_is_an_error():
    model = Ffn()
    for target in (model, torch.compile(model, backend=without_inductor())):
        with pytest.raises(RuntimeError, match=r"no graph of .* was compiled with backend 'spt'"):
            sptc.report(target)
    other = torch.compile(model, backend="eager")
    other(X)
    with pytest.raises(RuntimeError, match="no graph"):
        sptc.report(other)


def test_recompiles_are_rows_of_one_region():
    model = nn.Sequential(Ffn(), Ffn())
    wrapped = torch.compile(model, backend=without_inductor(**NEVER), dynamic=False)
    for n in (5, 7, 11):
        wrapped(torch.randn(n, 16))
    report = sptc.report(wrapped)
    assert report.graphs == 3 and len(report.regions) == 6
    text = str(report)
    assert "2 of 2 regions rewritten, 3 graphs, 2 of them of the same code for other sizes or in another mode" in text
    assert text.count("ffn") == 2 and "break:" not in text and "the model is in" not in text
    assert report.totals()["flops_before"] == sum(r.flops_before for r in report.regions if r.graph == 2)


def test_other_instances_of_the_same_code_are_regions_of_their_own():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = Ffn()

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.ffn(x)

    report = sptc.report(compiled(nn.Sequential(Layer(), Layer())))
    assert "2 of 2 regions rewritten" in str(report) and "of the same code" not in str(report)


def test_breaks_come_first_with_their_places():
    for report in (explain(Broken(), X, NEVER), sptc.report(compiled(Broken()))):
        first, second, *_ = str(report).splitlines()
        assert first == "sptc: the model is in 2 graphs; no region reaches from one into another"
        assert second.startswith("break: test_report.py:") and "graph_break" in second
        assert report.to_dict()["breaks"] == list(report.breaks) and len(report.breaks) == 1


class Partly(nn.Module):
    """One of two FFNs runs outside of any graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.hidden = Ffn(), Ffn(hidden=32)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(self.outside(x))

    @torch.compiler.disable
    def outside(self, x: Tensor) -> Tensor:
        return self.hidden(x) * self.scale


def test_what_is_in_no_graph_is_listed():
    for report in (explain(Partly(), X, NEVER), sptc.report(compiled(Partly()))):
        (note,) = [note for note in report.notes if "in no graph" in note]
        assert note.startswith("in no graph: scale, hidden; ")
    assert not [note for note in explain(Broken(), X, NEVER).notes if "in no graph" in note]


class Bare(nn.Module):
    """Whatever has parameters runs outside of any graph."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = Ffn()

    def forward(self, x: Tensor) -> Tensor:
        return torch.compiler.disable(self.ffn)(x.sin()).cos()


def test_graphs_that_read_no_parameter_are_a_note():
    for report in (explain(Bare(), X, NEVER), sptc.report(compiled(Bare()))):
        assert [note for note in report.notes if note.startswith("no graph reads a parameter of the model")]
    assert not explain(torch.nn.Tanh(), X, NEVER).notes


def test_a_deepcopy_has_no_report_until_it_is_compiled():
    backend, model = without_inductor(**NEVER), Ffn()
    model.compile(backend=backend)
    model(X)
    twin = copy.deepcopy(model)
    twin(X)
    with pytest.raises(RuntimeError, match="a deepcopy anew"):
        sptc.report(twin)
    twin.compile(backend=backend)
    twin(X)
    assert len(sptc.report(twin).regions) == 1 == len(sptc.report(model).regions)


def test_the_recompile_limit_is_a_note():
    with torch._dynamo.config.patch(recompile_limit=2):
        wrapped = torch.compile(Ffn(), backend=without_inductor(**NEVER), dynamic=False)
        wrapped(X)
        assert not [note for note in sptc.report(wrapped).notes if "recompile_limit" in note]
        for n in (6, 7, 8):
            wrapped(torch.randn(n, 16))
        (note,) = [note for note in sptc.report(wrapped).notes if "recompile_limit" in note]
        assert "Ffn.forward (test_report.py:" in note and "was compiled 2 times" in note
        assert "what changed last: tensor 'x' size mismatch at index 0" in note


def test_a_pattern_that_names_no_region_is_a_note():
    report = explain(Broken(), X, {**NEVER, "exclude": ["second", "s*d", "third"]})
    assert report.unmatched == ("third",) and "note: option 'exclude': 'third' names no region" in str(report)
    assert [(r.module, r.rule) for r in report.regions] == [("first", None), ("second", "exclude")]
    assert "option 'exclude': 'third' names no region" in report.to_dict()["notes"]


class Masked(nn.Module):
    """Attention under a mask that comes as a tensor, and one that is built."""

    def forward(self, q: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_what_an_unread_mask_loses_is_a_note():
    q, causal = torch.randn(1, 2, 64, 8, requires_grad=True), torch.ones(64, 64, dtype=torch.bool).tril()
    lost, options = "could not be read and stays a tensor", {**NEVER, "attention.density": 0.125}
    (note,) = explain(Masked(), (q, causal), options).notes
    assert note.startswith(f"the mask of 1 attention region ((root)) {lost}")
    (note,) = explain(Masked(), (q, torch.zeros(64, 64).masked_fill(~causal, -torch.inf)), options).notes
    assert lost in note
    assert explain(Masked(), (q,), options).notes == ()
    assert explain(Masked(), (q, causal), {**NEVER, "attention.density": 1.0}).notes == ()
    assert explain(Masked(), (q, causal), {"attention.enabled": False}).notes == ()
