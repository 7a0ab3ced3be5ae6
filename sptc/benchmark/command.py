"""`sptc bench MODEL` on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sptc.benchmark.bench import bench
from sptc.benchmark.job import DTYPES
from sptc.benchmark.outcome import Bench
from sptc.benchmark.show.page import page
from sptc.benchmark.show.plot import check_plot, plot
from sptc.benchmark.variants import BenchError, parse_options

# Arguments that `bench` takes as they are.
_OF_THE_MODEL = ("dtype", "device", "sequences", "lengths", "lora", "counted", "checkpointing")
_OF_THE_RUN = ("plan", "kinds", "threads", "steps", "seconds", "once")


def add_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """The arguments of `sptc bench`; `model` describes the first."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{model}; a factory with parameters batch and length is given them")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="fp32",
        help="bf16: autocast over fp32 weights, for all variants; bf16-weights: weights in bf16, PEFT's adapters in fp32 (default fp32)",
    )
    add(
        "--length",
        dest="lengths",
        type=_lengths,
        metavar="N[,N...]",
        help="tokens of a sequence; several lengths are a benchmark each (default 512)",
    )
    add("--batch", dest="sequences", type=int, metavar="N", help="sequences (default 1)")
    add("--variant", action="append", default=[], metavar="NAME=JSON", help='one more of "spt": \'half={"ffn.density": 0.5}\'; repeatable')
    add(
        "--inductor",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="one more of Inductor, with options of torch.compile; repeatable",
    )
    add("--plan", metavar="FILE", help="one more, with what sptc plan wrote")
    add("--kinds", action="store_true", help="also spt-attention, spt-ffn and spt-loss: regions of one kind alone, and what each gains")
    add(
        "--only",
        metavar="NAME[,NAME...]",
        help="run these: eager, inductor, inductor-best, spt-density-1, spt, spt-plan, or names of your own",
    )
    add("--lora", type=int, metavar="R", help="rank of adapters on every linear layer, 0: as the model is (default: 16 for Hugging Face's)")
    add(
        "--counted",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the tokens whose label counts, at the end of each sequence (default 1)",
    )
    add("--checkpointing", action="store_true", help="with activation checkpointing, as transformers has it")
    add("--device", help="cpu, cuda, cuda:1 (default cpu)")
    add("--threads", type=int, help="of each process on a CPU (default: as torch has it)")
    add("--steps", type=int, default=20, help="timed steps of each variant (default 20)")
    add("--seconds", type=float, default=120.0, help="of timing at one length, after which no turn begins (default 120)")
    add("--once", action="store_true", help="check and time a variant in one process: sooner done, without seconds of a warm compile")
    add("--json", metavar="FILE", help="write all that was measured; - prints it in place of the tables")
    add("--html", metavar="FILE", help="write a page that needs no other file")
    add("--plot", metavar="FILE", help="write two plots, as .png or .svg; needs matplotlib")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The exit status is 1 if a variant failed, or one that must equal the dense model does not."""
    for path in (arguments.json, arguments.html, arguments.plot):
        if path is not None and path != "-" and not Path(path).absolute().parent.is_dir():
            raise BenchError(f"{path!r}: there is no such folder")
    if arguments.plot is not None:
        check_plot(arguments.plot)
    done = bench(
        arguments.model,
        variants=dict(parse_options(text, "spt") for text in arguments.variant),
        inductor=dict(parse_options(text, "inductor") for text in arguments.inductor),
        only=None if arguments.only is None else [name.strip() for name in arguments.only.split(",")],
        **{name: getattr(arguments, name) for name in (*_OF_THE_MODEL, *_OF_THE_RUN)},
    )
    write(done, arguments.json, arguments.html, arguments.plot)
    return int(not all(outcome.sound for case in done.cases for outcome in case.outcomes))


def write(done: Bench, to_json: str | None, to_html: str | None, to_plot: str | None) -> None:
    """Print the tables, or JSON in place of them, and write the files that were asked for."""
    text = json.dumps(done.to_dict(), indent=1)
    print(text if to_json == "-" else done)
    for outcome in (outcome for case in done.cases for outcome in case.outcomes if outcome.trace):
        print(f"\n{outcome.variant.name} failed:\n{outcome.trace}", file=sys.stderr)
    if to_json not in (None, "-"):
        Path(to_json).write_text(text + "\n", encoding="utf-8")
    if to_html is not None:
        Path(to_html).write_text(page(done), encoding="utf-8")
    if to_plot is not None:
        plot(done.to_dict(), to_plot)
    for path in (to_json, to_html, to_plot):
        if path not in (None, "-"):
            print(f"wrote {path}", file=sys.stderr)


def _lengths(text: str) -> list[int]:
    lengths = [int(part) for part in text.split(",")]
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return lengths
