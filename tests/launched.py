"""Runs a script with backend "spt" as tests have it, nothing declined and without Inductor: `python -m tests.launched SCRIPT`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import fx
from torch._dynamo.backends import registry

from tests.models.compiled import without_inductor


def main() -> None:
    script = Path(sys.argv[1])
    sys.argv = [str(script)]
    sys.path.insert(0, str(script.parent))
    registry._COMPILER_FNS["spt"] = spt
    runpy.run_path(str(script), run_name="__main__")


def spt(gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None) -> Any:
    return without_inductor(decline="never", **(options or {}))(gm, example_inputs)


if __name__ == "__main__":
    main()
