"""`python -m bench.quality`: fine-tune small models dense and sparse, from the same seed on the same data, and compare what they learn."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from tabulate import tabulate

from bench.quality.diagnose import AttentionMeasure, FfnMeasure, Measure, diagnose
from bench.quality.gsm8k import gsm8k
from bench.quality.language_model import MODELS, pretrained
from bench.quality.planned import prepare
from bench.quality.plot import plot
from bench.quality.results import FOLDER, done, load, path_of, save, table
from bench.quality.rise import rises
from bench.quality.tasks import Budget, Task, answers, classify, lm
from bench.quality.training import DIAGNOSED, Record, example_order, train
from bench.quality.variants import DENSE, VARIANTS, variant
from sptc.plans.budget import PlanError

TASKS: dict[str, Callable[[Budget, str], Task]] = {"classify": classify, "lm": lm, "answers": answers, "gsm8k": gsm8k}
BUDGETS = {
    "classify": Budget(steps=120, batch=4, learning_rate=2e-4, every=40, held_out=192),
    "lm": Budget(steps=150),
    "answers": Budget(steps=100),
    "gsm8k": Budget(steps=60, batch=4, learning_rate=5e-4, every=60, held_out=48, falling=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    commands = parser.add_subparsers(required=True)

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", choices=MODELS, default="10M", help="the language model of lm and answers (default: %(default)s)")
    pretrain = commands.add_parser("pretrain", parents=[model], help="pretrain the language model, and keep it in the cache folder")
    pretrain.set_defaults(act=_pretrain)

    what = argparse.ArgumentParser(add_help=False, parents=[model])
    what.add_argument("--task", action="append", choices=TASKS, help="may be repeated (default: all)")
    what.add_argument("--variant", action="append", help=f"""{", ".join(VARIANTS)}, or name='{{"option": value}}'; may be repeated""")
    what.add_argument("--batch", type=int, help="sequences a step")

    held = argparse.ArgumentParser(add_help=False)
    held.add_argument("--held-out", type=int, help="most held-out sequences")
    held.add_argument("--compile", choices=("inductor", "aot"), default="inductor", help="aot: no Inductor, whose compiles take minutes")

    run = commands.add_parser("run", parents=[what, held], help="fine-tune every variant on every task with every seed")
    run.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default: %(default)s)")
    run.add_argument("--steps", type=int)
    run.add_argument("--every", type=int, help="steps between evaluations")
    run.add_argument("--learning-rate", action="append", type=float, help="may be repeated: every variant at each rate")
    run.add_argument("--falling", action=argparse.BooleanOptionalAction, help="let the learning rate fall (default: as the task says)")
    run.add_argument("--out", type=Path, default=FOLDER, help="folder of the results (default: %(default)s)")
    run.set_defaults(act=_run)

    regions = commands.add_parser("diagnose", parents=[what], help="what sparsity does to each region before training")
    regions.set_defaults(act=_diagnose)

    untrained = commands.add_parser("rise", parents=[what, held], help="the rise of the held-out loss before training")
    untrained.set_defaults(act=_rise)

    for name, act, text in (("table", _table, "print the results"), ("plot", _plot, "draw held-out loss over steps and seconds")):
        shown = commands.add_parser(name, help=text)
        shown.add_argument("--out", type=Path, default=FOLDER, help="folder of the results (default: %(default)s)")
        shown.add_argument(
            "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of all threads, for a machine that others use too"
        )
        shown.set_defaults(act=act)

    arguments = parser.parse_args()
    arguments.act(arguments)


def _pretrain(arguments: argparse.Namespace) -> None:
    print(f"held-out loss {pretrained(MODELS[arguments.model]).loss:.3f}")


def _budget(task: str, arguments: argparse.Namespace) -> Budget:
    given = {name: getattr(arguments, name, None) for name in ("steps", "batch", "every", "held_out", "falling")}
    return replace(BUDGETS[task], **{name: value for name, value in given.items() if value is not None})


def _run(arguments: argparse.Namespace) -> None:
    variants = dict(variant(text) for text in arguments.variant or VARIANTS)
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    for name in arguments.task or TASKS:
        budget = _budget(name, arguments)
        task = TASKS[name](budget, arguments.model)
        print(f"{name}: {len(task.train)} sequences to train on, {len(task.held_out)} held out")
        budgets = [replace(budget, learning_rate=rate) for rate in arguments.learning_rate or [budget.learning_rate]]
        for seed in range(arguments.seeds):
            for budget, (label, options) in product(budgets, variants.items()):
                record = Record(name, task.model, label, options, seed, budget, arguments.compile, machine=machine)
                if done(arguments.out, record):
                    print(f"{path_of(arguments.out, record)} is there already; remove it to run it again")
                    continue
                try:
                    train(task, record)
                except PlanError as error:  # of this variant alone
                    print(f"{name}, {label}, seed {seed}: {error}")
                    continue
                save(arguments.out, record)
    print(table(load(arguments.out), "wall"))


def _diagnose(arguments: argparse.Namespace) -> None:
    chosen = dict(variant(text) for text in arguments.variant or ["paper"])
    for name in arguments.task or TASKS:
        budget = _budget(name, arguments)
        task = TASKS[name](budget, arguments.model)
        batch = task.train.take(example_order(len(task.train), budget, seed=0)[0])
        for label, options in chosen.items():
            if options is None:
                raise SystemExit(f"nothing to measure: {DENSE!r} has no sparse region")
            torch.manual_seed(0)
            objective = task.objective().train()
            with TemporaryDirectory() as folder:
                options, planned = prepare(objective, batch, options, Path(folder))
                measures = diagnose(objective, {key: value[:DIAGNOSED] for key, value in batch.items()}, options)
            parts = [f"{name}, {label}: before training", *([str(planned)] if planned is not None else []), regions_table(measures)]
            print("\n" + "\n\n".join(parts))


def _rise(arguments: argparse.Namespace) -> None:
    variants = dict(variant(text) for text in arguments.variant or ["paper"])
    for name in arguments.task or TASKS:
        budget = _budget(name, arguments)
        print(f"{name}: held-out loss before training, and its rise against the dense model")
        for label, loss, rise in rises(TASKS[name](budget, arguments.model), variants, budget, arguments.compile):
            print(f"{label:20} {loss:.4f} {rise:+.4f}", flush=True)


def regions_table(measures: list[Measure]) -> str:
    """Attention regions, then FFN regions."""
    attention = [
        (m.module, *(f"{x:.3f}" for x in (m.error, m.mass, m.best_error, m.best_mass, m.nearest_mass, m.keys_mass)))
        for m in measures
        if isinstance(m, AttentionMeasure)
    ]
    headers = ("attention", "error", "mass kept", "best blocks: error", "mass", "nearest blocks: mass", "best keys: mass")
    ffn = [(m.module, f"{m.error:.3f}", " ".join(f"{x:.2f}" for x in m.shares)) for m in measures if isinstance(m, FfnMeasure)]
    parts = [(attention, headers), (ffn, ("FFN", "error", "share of tokens of each block"))]
    return "\n\n".join(tabulate(rows, names, tablefmt="github", disable_numparse=True) for rows, names in parts if rows)


def _table(arguments: argparse.Namespace) -> None:
    print(table(load(arguments.out), arguments.clock))


def _plot(arguments: argparse.Namespace) -> None:
    for path in plot(load(arguments.out), arguments.out, arguments.clock):
        print(path)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("sptc.paper.state").setLevel(logging.ERROR)  # that a prepared model runs dense in eager mode is what we evaluate
    warnings.filterwarnings("ignore", module="torch")  # between progress bars
    main()
