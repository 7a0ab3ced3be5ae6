"""`sptc.explain(model, example_inputs)`: what a compile would do, without compiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from sptc.backend import captured_unit
from sptc.config import Config
from sptc.model.capture import capture
from sptc.model.outside import outside_note
from sptc.passes import ANALYSIS
from sptc.passes.runner import run
from sptc.plans.rise import weigh_alone
from sptc.reports.dump import Dump
from sptc.reports.report import Report


def explain(model: Callable[..., Any], example_inputs: Any, options: Mapping[str, Any] | None = None) -> Report:
    """Capture the model's graphs, find regions and judge them. Nothing is compiled and nothing of the model or of Dynamo is changed.

    The model runs once, eagerly, in the mode it is in (train or eval): a batch as training will see it gives the costs of a training step.
    Where the densities of FFNs are left to measurement, as they are by default, it runs some more times for each FFN.

    Args:
        model: a module or a function, compiled or not.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        options: as for `torch.compile(model, backend="spt", options=...)`.

    Raises:
        ConfigError: unknown option, wrong type, out of range, or a device without kernels.
        CaptureError: Dynamo captured no graph.
    """
    config = Config.from_options(options)
    reports: list[Report] = []
    read: set[int] = set()  # parameters

    def judge(gm: fx.GraphModule, inputs: list[Any]) -> None:
        dump = Dump.of(config)
        unit = captured_unit(gm, inputs, config)
        if dump is not None:
            dump("captured", unit)
        report = Report.of([run(unit, (*ANALYSIS, (weigh_alone, "as compiling would")), observe=dump)])
        if dump is not None:
            dump.report(report)
        reports.append(report)
        read.update(id(x) for x in inputs if isinstance(x, nn.Parameter))

    capture(model, example_inputs, judge)
    outside = outside_note(model, read) if isinstance(model, nn.Module) else None
    return Report.merged(reports, [outside] if outside is not None else ())
