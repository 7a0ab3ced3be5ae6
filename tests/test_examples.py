"""Every example runs as it stands on its tiny model: the loss falls, regions are rewritten, the adapter is plain PEFT's and was trained."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SCRIPTS = {"plain_loop": "5 of 5", "trainer": "5 of 5", "trl_sft": "5 of 5", "ddp": "5 of 5", "fsdp2": "4 of 4"}  # regions rewritten


def test_every_example_is_tested_and_short() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")}
    assert files.keys() == SCRIPTS.keys() | {"task"}
    assert all(len(text.splitlines()) < 60 for text in files.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name: str, tmp_path: Path) -> None:
    if name == "trl_sft":
        pytest.importorskip("trl")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] if name in ("ddp", "fsdp2") else []
    command = [sys.executable, "-m", *launcher, "tests.launched", str(ROOT / "examples" / f"{name}.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"\bloss'?:? '?(\d+\.\d+)", done.stdout)]
    assert len(losses) == 20 and statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 0.1
    assert f"\n{SCRIPTS[name]} regions rewritten" in done.stdout
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7 and all(x.any() for x in adapter.values())
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.[01]\.\w+\.\w+_proj\.lora_[AB]\.weight", key) for key in adapter)
