import json
import os
import re

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from sptc.config import Config, ConfigError
from sptc.reports.dump import Dump
from sptc.reports.explain import explain
from tests.models.compiled import without_inductor
from tests.models.zoo import CASES

FILES = ["00.captured.py", "01.normalized.py", "02.rewritten.py", "regions.json", "regions.md", "report.txt", "repro.py"]


def test_a_compile_leaves_its_graphs_and_report(tmp_path):
    model, inputs = CASES["llama-sdpa-padded"].make()
    torch.compile(model, backend=without_inductor(**{"decline": "never", "attention.density": 0.5, "dump": str(tmp_path)}))(**inputs)
    assert sorted(os.listdir(tmp_path)) == ["graph0"]
    folder = tmp_path / "graph0"
    assert sorted(os.listdir(folder)) == FILES
    texts = {name: (folder / name).read_text() for name in FILES}
    for name in FILES[:3]:
        compile(texts[name], name, "exec")
    assert "torch.ops.aten" in texts["01.normalized.py"] and "ops.sptc" not in texts["01.normalized.py"]
    assert texts["02.rewritten.py"].count("torch.ops.sptc.choose_units.default") == 2
    assert texts["02.rewritten.py"].count("torch.ops.sptc.sparse_attention.default") == 2
    assert "f32[" in texts["00.captured.py"], "shapes are shown"
    regions = json.loads(texts["regions.json"])["regions"]
    assert [r["status"] for r in regions] == [*["rewritten"] * 4, "refused"], "the loss, whose logits the model returns"
    assert all(r["module"] in texts["report.txt"] for r in regions)

    boxes = re.findall(r'r(\d+)\["(.*?)<br>(.*?)"\]:::(\w+)', texts["regions.md"])
    assert [int(box[0]) for box in boxes] == [0, 1, 2, 3, 4] and boxes[0][1:] == (
        "model.layers.0.self_attn",
        "attention rewritten",
        "rewritten",
    )
    assert re.findall(r"r(\d) --> r(\d)", texts["regions.md"]) == [(str(i), str(i + 1)) for i in range(4)], "the residual stream is a chain"


def test_graph_breaks_and_further_compiles_overwrite_nothing(tmp_path):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    options = {"dump": str(tmp_path)}
    torch.compile(Broken(), backend=without_inductor(**options))(torch.randn(3))
    first = {p: p.read_bytes() for p in tmp_path.glob("*/*")}
    explain(Broken(), torch.randn(5), options)
    assert sorted(os.listdir(tmp_path)) == ["graph0", "graph1", "graph2", "graph3"]
    assert {p: p.read_bytes() for p in first} == first
    assert "02.rewritten.py" not in os.listdir(tmp_path / "graph2"), "explain rewrites nothing"


def test_parallel_regions_do_not_reach_each_other(tmp_path):
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    explain(Parallel(), torch.randn(4, 16), {"dump": str(tmp_path)})
    chart = (tmp_path / "graph0" / "regions.md").read_text()
    assert sorted(re.findall(r"r(\d) --> r(\d)", chart)) == [("0", "2"), ("1", "2")]


def test_a_folder_that_cannot_be_made_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    options = {"dump": str(tmp_path / "file" / "folder")}
    with pytest.raises(ConfigError, match="option 'dump': cannot write to"):
        Dump.of(Config.from_options(options))
    with pytest.raises(BackendCompilerFailed, match="option 'dump'"):
        torch.compile(nn.Linear(3, 3), backend=without_inductor(**options))(torch.randn(2, 3))
    assert Dump.of(Config()) is None
