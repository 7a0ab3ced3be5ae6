"""Compiled graphs on disk are those of the sources at hand: AOTAutograd's key holds no more of our operators than their names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sptc

ROOT = Path(sptc.__file__).parent.parent

PROGRAM = """
import json, torch
from torch import nn
from torch._dynamo.utils import counters
from sptc.backend import spt

class Ffn(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

torch.manual_seed(0)
model, x = Ffn(), torch.randn(16, 8, requires_grad=True)
options = {"decline": "never", "ffn.selector": "router", "ffn.blocks": 4, "inductor": {"cpp_cache_precompile_headers": False}}
for _ in range(2):
    torch._dynamo.reset()
    (grad,) = torch.autograd.grad(torch.compile(model, backend=lambda gm, inputs: spt(gm, inputs, options=options))(x).sum(), x)
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    print(json.dumps({"grad": grad.sum().item(), "hits": hits}))
"""


@pytest.fixture
def sources(tmp_path):
    """A copy of the package, to be edited."""
    for folder in ("sptc", "passes", "codegen"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(sources: Path) -> list[dict[str, float]]:
    """The program's two compiles: the gradient, and how many graphs came from a cache until then."""
    environment = {**os.environ, "PYTHONPATH": str(sources), "TORCHINDUCTOR_CACHE_DIR": str(sources / "caches")}
    environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=sources, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-2:]]


def test_a_formula_of_ours_that_changed_is_run_from_warm_caches_too(sources):
    cold, warm = run(sources)
    assert warm["grad"] == cold["grad"] and cold["hits"] == 0 < warm["hits"]
    path = sources / "codegen" / "ops" / "block_products.py"
    text = path.read_text()
    assert text.count("return of_x, ops.outer_product(") == 1
    path.write_text(text.replace("return of_x, ops.outer_product(", "return 2 * of_x, ops.outer_product("))
    changed, _ = run(sources)
    assert changed == {"grad": 2 * cold["grad"], "hits": 0}
