"""The `sptc` command: explain a model, plan its densities, dump what the passes make of it, compare its training steps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from sptc.backend import compile_graph
from sptc.benchmark.command import add_arguments
from sptc.config import Config, ConfigError
from sptc.ir.errors import SptcError
from sptc.ir.plan import Plan
from sptc.model.capture import capture
from sptc.model.load import load_model
from sptc.plans.budget import check_target
from sptc.plans.planning import plan
from sptc.reports.explain import explain
from sptc.reports.report import Report

T = TypeVar("T")

MODEL = "a Hugging Face name, a folder written by save_pretrained, or package.module:factory; factory() returns (model, example_inputs)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 with a message when the command line is wrong."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except SptcError as error:
        print(f"sptc: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sptc", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    explain = commands.add_parser("explain", help="say what a compile would do, without compiling")
    explain.set_defaults(run=_explain)
    dump = commands.add_parser("dump", help="write the graphs before and after the passes")
    dump.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    dump.set_defaults(run=_dump)
    plan = commands.add_parser("plan", help="choose a density for each region, for a budget of time, error or memory of a training step")
    budget = plan.add_mutually_exclusive_group(required=True)
    budget.add_argument("--speedup", type=float, help="predicted speed-up to reach at the least error")
    budget.add_argument("--max-error", type=float, help="predicted error not to exceed, as fast as possible")
    budget.add_argument(
        "--max-memory", type=_bytes, metavar="BYTES", help="predicted bytes kept for backward not to exceed, such as 500MB or 2GiB"
    )
    budget.add_argument("--max-rise", type=float, help="relative rise of the loss before training not to exceed; what a compile measures")
    plan.add_argument("--out", metavar="FILE", help="where to save the plan, for --plan and options={'plan': FILE}")
    plan.set_defaults(run=_plan, train=True)
    for command in (explain, dump):
        command.add_argument("--inference", dest="train", action="store_false", help="without gradients; otherwise a training step")
        command.add_argument("--plan", metavar="FILE", help="as --option plan=FILE; explain prints it too")
    for command in (explain, dump, plan):
        command.add_argument("model", metavar="MODEL", help=MODEL)
        command.add_argument(
            "--option", action="append", default=[], metavar="KEY=VALUE", help="as in torch.compile(options={...}); repeatable"
        )
        command.add_argument("--batch", type=_positive, help="sequences of a Hugging Face model's example (default 1)")
        command.add_argument("--length", type=_positive, help="tokens of each (default 512)")
        command.add_argument("--json", action="store_true", help="print as JSON")

    bench = commands.add_parser("bench", help="compare training steps, dense and sparse: checked, then timed in turns")
    add_arguments(bench, MODEL)
    return parser


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str) -> float:
    number = text.strip().rstrip("BbIiKkMmGg ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"must be bytes, such as 2e9, 500MB or 2GiB, got {text!r}") from None


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return value


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """["ffn.blocks=4"] -> {"ffn.blocks": 4}. Values are JSON where they parse as such, text otherwise; `Config` checks types.

    Raises:
        ConfigError: no "=" in a pair, or a key given twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair!r} must be KEY=VALUE, for example --option ffn.density=0.5")
        if key in options:
            raise ConfigError(f"--option {key!r} is given twice")
        try:
            options[key] = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except ValueError:
            options[key] = text
    return options


def _explain(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    config = Config.from_options(options)
    report = _on_model(arguments, lambda model, inputs: explain(model, inputs, options))
    if config.plan is not None and not arguments.json:
        print(f"{Plan.load(config.plan)}\n")
    _print(arguments, report)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.out is not None and not Path(arguments.out).absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out!r}: there is no such folder")
    if arguments.out is not None and Path(arguments.out).is_dir():
        raise ConfigError(f"--out {arguments.out!r} is a folder; name the file to write the plan to")
    targets = {name: getattr(arguments, name) for name in ("speedup", "max_error", "max_memory", "max_rise")}
    check_target(**targets)
    with tqdm(desc="runs", unit="run", disable=None) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        made = _on_model(
            arguments,
            lambda model, inputs: plan(model, inputs, **targets, options=_options(arguments), progress=progress),
        )
    _print(arguments, made)
    if arguments.out is not None:
        made.save(arguments.out)
        print(f"wrote {arguments.out}", file=sys.stderr)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = parse_options(arguments.option)
    if getattr(arguments, "plan", None) is not None:
        if "plan" in options:
            raise ConfigError("--plan and --option plan=... are both given")
        options["plan"] = arguments.plan
    return options


def _dump(arguments: argparse.Namespace) -> int:
    config = Config.from_options({**_options(arguments), "dump": arguments.out})

    def rewrite(model: Callable[..., Any], inputs: Any) -> Report:
        reports: list[Report] = []

        def on_graph(gm: Any, graph_inputs: list[Any]) -> None:
            # What was rewritten is written down, not run.
            reports.append(compile_graph(gm, graph_inputs, config, inner=lambda *_: gm.forward).report)

        capture(model, inputs, on_graph)
        return Report.merged(reports)

    _print(arguments, _on_model(arguments, rewrite))
    print(f"wrote {arguments.out}", file=sys.stderr)
    return 0


def _on_model(arguments: argparse.Namespace, run: Callable[[Callable[..., Any], Any], T]) -> T:
    model, inputs = load_model(arguments.model, arguments.batch, arguments.length)
    if isinstance(model, torch.nn.Module):
        model.train(arguments.train)
    with torch.set_grad_enabled(arguments.train):
        return run(model, inputs)


def _print(arguments: argparse.Namespace, made: Report | Plan) -> None:
    print(json.dumps(made.to_dict(), indent=1) if arguments.json else made)


if __name__ == "__main__":
    sys.exit(main())
