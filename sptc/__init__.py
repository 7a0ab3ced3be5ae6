"""A torch.compile backend that rewrites attention and FFN regions into sparse equivalents for fine-tuning.

`torch.compile(model, backend="spt")` needs no import: the backend is an entry point. `prepare` before the optimizer is made adds trainable
routers (and codebooks, for the selector "pq"), `save_state` and
`load_state` keep them in a file, and `detach` takes them away; `explain` says what a compile would do; `report` says what it
did; `plan` chooses densities for a budget; `bench` compares training steps.
"""

from sptc.benchmark.bench import bench
from sptc.config import Config, ConfigError
from sptc.ir.errors import SptcError
from sptc.ir.plan import Plan
from sptc.model.compiled import report
from sptc.model.logits import DroppedLogitsError, StaleLogitsError
from sptc.paper.prepare import detach, prepare
from sptc.paper.saved import StateError, load_state, save_state
from sptc.paper.state import step
from sptc.plans.planning import plan
from sptc.reports.explain import explain
from sptc.reports.report import Report

__all__ = [
    "Config",
    "ConfigError",
    "DroppedLogitsError",
    "Plan",
    "Report",
    "SptcError",
    "StaleLogitsError",
    "StateError",
    "bench",
    "detach",
    "explain",
    "load_state",
    "plan",
    "prepare",
    "report",
    "save_state",
    "step",
]
