"""Scripts that a dump writes: they run by themselves, hold nothing of the user's, and show the regions of the graph they are of."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sptc.reports.explain import explain
from sptc.reports.repro_main import step
from tests.models.compiled import FULL as WHOLE
from tests.models.compiled import assert_gradients_close, without_inductor
from tests.models.zoo import CASES

FULL = {**WHOLE, "ffn.padding": "compute"}  # a script compares all that its graph returns, at padding as well


@pytest.fixture(autouse=True)
def no_script_left():
    yield
    sys.modules.pop("repro_of_tests", None)


def dumped(model: nn.Module, inputs: dict[str, Tensor], folder: Path, autocast: bool = False) -> list[Path]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.compile(model, backend=without_inductor(dump=str(folder), **FULL))(**inputs)
    torch._dynamo.reset()
    return sorted(folder.glob("*/repro.py"))


def loaded(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("repro_of_tests", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["repro_of_tests"] = module  # Dynamo looks for the module of what it compiles
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name, how",
    [("opt-sdpa", "plain"), ("llama-sdpa-padded", "plain"), ("llama-sdpa-padded", "checkpointed"), ("bert-eager-padded", "autocast")],
)
def test_a_script_shows_the_regions_and_equals_the_dense_graph_at_density_one(tmp_path, name, how):
    model, inputs = CASES[name].make()
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    (path,) = dumped(model, inputs, tmp_path, how == "autocast")
    script = loaded(path)
    assert (("cpu", "bfloat16") if how == "autocast" else None) == script.AUTOCAST
    assert script.OPTIONS == FULL
    arguments = script.inputs()
    want = step(script.Graph(), arguments, script.AUTOCAST)
    assert any(key.startswith("gradient") and float(value.abs().max()) > 0 for key, value in want.items())
    compiled = torch.compile(script.Graph(), backend=without_inductor(**FULL))
    found = step(compiled, arguments, script.AUTOCAST)
    kinds = [r.kind for r in explain(script.Graph(), arguments, FULL).regions if r.status == "rewritten"]
    assert sorted(kinds) == ["attention"] * len(CASES[name].attention) + ["ffn"] * CASES[name].ffn
    assert_gradients_close(found, want, 5e-2 if how == "autocast" else 1e-5)


def test_no_value_of_the_user_is_written_down(tmp_path):
    class Secret(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[0.123456, 7.654321], [3.0, 4.0]]))
            self.register_buffer("ids", torch.tensor([271828, 271829, 314159]))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).sum() + self.ids.sum()

    (path,) = dumped(Secret(), {"x": torch.randn(2, 2)}, tmp_path)
    text = path.read_text()
    assert "floats((2, 2)" in text and "integers((3,)" in text
    assert not any(value in text for value in ("0.1234", "7.65", "271829"))
    assert step(loaded(path).Graph(), loaded(path).inputs(), None)


def test_labels_keep_what_is_ignored_and_stay_in_range(tmp_path):
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 11)

        def forward(self, x: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.head(x * mask), labels)

    labels = torch.arange(200) % 11
    labels[::2] = -100
    mask = torch.ones(200, 1, dtype=torch.bool)
    (path,) = dumped(Loss(), {"x": torch.randn(200, 4), "labels": labels, "mask": mask}, tmp_path)
    drawn = next(x for x in loaded(path).inputs() if x.dtype == torch.int64)
    counted = drawn[drawn != -100]
    assert int(counted.min()) >= 0 and int(counted.max()) <= 10 and 50 < len(counted) < 150
    assert all(bool(x.all()) for x in loaded(path).inputs() if x.dtype == torch.bool)


def test_means_and_deviations_are_of_a_sample(tmp_path):
    rows = torch.arange(2.0**20).remainder(7)[:, None].expand(-1, 2**20)  # all of it in fp64 would be 8 TiB

    class Looked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:4, :4].sum()

    (path,) = dumped(Looked(), {"x": rows}, tmp_path)
    assert f"floats({tuple(rows.shape)}, {rows.stride()}, torch.float32, 'cpu', 3, 2, False" in path.read_text()


def test_layouts_parameters_and_flags_are_kept(tmp_path):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5).t())
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight * self.frozen

    (path,) = dumped(Mixed(), {"x": torch.randn(2, 5)}, tmp_path)
    by_shape = {tuple(x.shape): x for x in loaded(path).inputs()}
    weight, frozen = by_shape[5, 3], by_shape[3,]
    assert weight.stride() == (1, 5) and isinstance(weight, nn.Parameter) and weight.requires_grad
    assert isinstance(frozen, nn.Parameter) and not frozen.requires_grad and torch.equal(frozen, torch.ones(3))


def test_bodies_with_a_context_function_are_called_by_import(tmp_path):
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda y: self.b(checkpoint(self.a, y, use_reentrant=False)).relu(), x, use_reentrant=False)

    (path,) = dumped(Body(), {"x": torch.randn(2, 4)}, tmp_path)
    assert path.read_text().count("torch.utils.checkpoint.checkpoint(") == 2
    assert step(loaded(path).Graph(), loaded(path).inputs(), None)


def test_what_has_no_text_makes_a_script_that_says_so(tmp_path):
    outside = torch.compiler.allow_in_graph(lambda x: x * 2)

    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return outside(x) + 1

    folders = dumped(Opaque(), {"x": torch.randn(2, requires_grad=True)}, tmp_path)
    assert any("can't be imported" in path.read_text() for path in folders)
    with pytest.raises(SystemExit, match="written down"):
        loaded(next(path for path in folders if "can't be imported" in path.read_text()))
