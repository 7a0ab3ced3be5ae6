"""`sptc.bench(model, batch)`: what a training step takes dense and sparse, checked, in turns, each variant in its own process."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sptc.benchmark.job import Source
from sptc.benchmark.model import make
from sptc.benchmark.outcome import Bench
from sptc.benchmark.run import Settings, run
from sptc.benchmark.show.progress import Progress
from sptc.benchmark.variants import BenchError, Variant, chosen, default_variants, fast_products, kind_variants, own_variants
from sptc.device.costs import check_device
from sptc.ir.plan import Plan
from sptc.model.load import factory_of, is_factory, takes_sizes

RANK = 16  # of the adapters that a Hugging Face model gets


def bench(
    model: str | torch.nn.Module,
    batch: Any = None,
    *,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    inductor: Mapping[str, Mapping[str, Any]] | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    kinds: bool = False,
    only: Iterable[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    sequences: int | None = None,
    lengths: Sequence[int] | None = None,
    lora: int | None = None,
    counted: float = 1.0,
    checkpointing: bool = False,
    threads: int | None = None,
    steps: int = 20,
    seconds: float = 120.0,
    once: bool = False,
    progress: bool = True,
) -> Bench:
    """Compare training steps (forward, loss, backward, AdamW): eager, Inductor, Inductor at its best, "spt" at density 1 and by default.

        print(sptc.bench(model, batch, variants={"half": {"ffn.density": 0.5}}))

    Each variant runs in its own process: the calling module is imported there again, so call this under `if __name__ == "__main__":`.
    First each is compiled without a cache and its loss and gradients are compared with the eager model's in a wider dtype; then all are
    timed in turns. Ratios are to the fastest dense variant, turn by turn. Nothing of `model` changes.

    Args:
        model: a module that trains, with `batch`; or a name, as the command `sptc bench` takes it, without.
        batch: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. The loss is `output.loss`, or the only
            number that the model returns, or the mean square of what it returns first.
        variants: more ones of backend "spt", options by name.
        inductor: more ones of Inductor, the options of `torch.compile(model, options=...)` by name.
        plan: what `sptc.plan` gave, or a file that its `save` wrote.
        kinds: also "spt" with attention alone, FFNs alone and losses alone, each with its predicted and its measured gain.
        only: names of the variants to run.
        dtype: "fp32"; "bf16" for autocast over fp32 weights; "bf16-weights" for weights in bf16, beside which PEFT's adapters are fp32;
            None: a module as it is, a named model in fp32.
        device: where; None: where the module is, a named model on the CPU.
        sequences: of a named model's batch, 1 by default.
        lengths: tokens of each sequence of a named model, one benchmark each; 512 by default.
        lora: rank of adapters that every linear layer gets, 0 for none; None: 16 for a Hugging Face model if PEFT is installed, else 0.
        counted: share of the tokens whose label counts, the last of each sequence.
        checkpointing: by `model.gradient_checkpointing_enable`.
        threads: of each process on a CPU; None: as torch has it.
        steps: timed steps of each variant.
        seconds: of timing at one length; after them no turn begins, but there are three at least.
        once: check and time a variant in one process, which is sooner done and does not tell how long a warm compile takes.
        progress: a bar on a terminal, lines in a log, on stderr.

    Returns:
        A `Bench`: `str` of it is its tables, `to_dict` all that was measured.

    Raises:
        BenchError, ConfigError, ModelError: something is wrong with what was asked for. No variant was run yet.
    """
    named = isinstance(model, str)
    at = _device(model, device)
    _check_batch(model, batch, sized=sequences is not None or bool(lengths))
    dtype = dtype or ("fp32" if named else None)
    products = fast_products(at, dtype or "fp32")
    standard = default_variants(at, dtype or "fp32", plan)
    standard += kind_variants(products) if kinds else []
    all_of_them = [*standard, *own_variants("inductor", inductor, products), *own_variants("spt", variants, products)]
    settings = Settings(
        variants=chosen(sorted(all_of_them, key=lambda variant: not variant.dense), only),
        batch=1 if sequences is None else sequences,
        lengths=(tuple(lengths) if lengths else (512,)) if _takes_sizes(model) else (None,),
        dtype=dtype,
        device=str(at),
        lora=_rank(model) if lora is None else lora,
        counted=counted,
        checkpointing=checkpointing,
        threads=threads,
        steps=steps,
        seconds=seconds,
        once=once,
    )
    with tempfile.TemporaryDirectory(prefix="sptc-bench-") as folder:
        source = Source(model) if isinstance(model, str) else Source.saved(model, batch, Path(folder))
        _try(source, settings)
        return run(source, settings, Progress(progress))


def _device(model: str | torch.nn.Module, wanted: str | None) -> torch.device:
    """Where to run: as `wanted`, or where the module is."""
    parameter = None if isinstance(model, str) else next(model.parameters(), None)
    try:
        device = torch.device(wanted) if wanted is not None else torch.device("cpu") if parameter is None else parameter.device
    except RuntimeError as error:
        raise BenchError(f"there is no device {wanted!r}; write cpu, cuda or cuda:1") from error
    check_device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"device {str(device)!r}: this torch sees no GPU")
    return device


def _check_batch(model: str | torch.nn.Module, batch: Any, sized: bool) -> None:
    """Whether the batch is made where it can be; `sized`: its size was asked for."""
    if not isinstance(model, str):
        if batch is None or sized:
            raise BenchError("a module needs a batch of yours, which has its own number of sequences and their length")
    elif batch is not None:
        raise BenchError("a named model makes its own batch; give `sequences` and `lengths`")
    elif sized and not _takes_sizes(model):
        raise BenchError(f"{model!r} makes a batch of its own size: a factory with parameters `batch` and `length` is given them")


def _takes_sizes(model: str | torch.nn.Module) -> bool:
    """Whether batches of it are made here, of any size."""
    return isinstance(model, str) and not (is_factory(model) and not takes_sizes(factory_of(model)))


def _rank(model: str | torch.nn.Module) -> int:
    named = isinstance(model, str) and not is_factory(model)
    return RANK if named and importlib.util.find_spec("peft") is not None else 0


def _try(source: Source, settings: Settings) -> None:
    """Make the model once here, so that whatever is wrong with it is said before any process starts."""
    job = settings.job(source, max(length or 1 for length in settings.lengths))
    make(replace(job, variant=Variant("", "eager"), device="cpu", threads=None))
    gc.collect()
