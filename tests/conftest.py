"""Every test starts without compiled code, and every run without what an earlier one cached."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
WORKER = "PYTEST_XDIST_WORKER" in os.environ  # workers inherit the environment of the process that starts them

if not WORKER:
    CACHE = tempfile.mkdtemp(prefix="sptc-tests-")
    for variable in CACHE_VARIABLES:
        os.environ[variable] = str(Path(CACHE, variable.lower()))

import torch  # noqa: E402  reads the variables above

if WORKER:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_unconfigure(config: pytest.Config) -> None:
    if not WORKER:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    """Dynamo forgets its graphs between tests: no test depends on what another compiled, nor meets its recompile limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def precision_of_products() -> Iterator[None]:
    """How fp32 products are computed is a process's to say, and part of what is measured and of kernels: no test leaves it changed."""
    matmul = torch.backends.cuda.matmul
    before, own = torch.get_float32_matmul_precision(), matmul.fp32_precision
    yield
    if torch.get_float32_matmul_precision() != before:
        torch.set_float32_matmul_precision(before)
    if matmul.fp32_precision != own:
        matmul.fp32_precision = own


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests of ops and kernels `torch.empty` and its kin hold NaN (the largest value for integers): an output left unwritten shows."""
    if "codegen" not in request.path.relative_to(request.config.rootpath).parts:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory acts in this mode only
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
