"""The table of architectures as a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import transformers

from bench.architectures.look import KINDS, Look

_HEAD = """# Architectures

Models of transformers, built tiny from their configuration classes (two layers, width 32, batch 2; `bench/architectures/build.py`), in
train mode without dropout. Written by `python -m bench.architectures table` from `bench/results/architectures.jsonl`, which
`python -m bench.architectures run` fills (transformers {transformers}, torch {torch}).

- attention, ffn: regions found, of what looks like one by rules of their own (`bench/architectures/count.py`): a softmax between two
  products of computed tensors, or a fused attention; a nonlinearity between two products with weights. Gates and experts count too. The
  finders also take FFNs whose nonlinearity is a product, and refuse low-rank pairs with a norm between, so more may be found than counted.
- refused: rules of refusals, and where; what each says stands below the table.
- unmentioned: what looks like a region and is in no region and no refusal.
- density 1: outputs and every gradient in fp32 with everything kept, all passes, against fp64 eager: the largest relative error, and that
  of eager in fp32 (0: a model that mixes dtypes has no fp64 form, one that chooses by its data is another one there; they were compared
  with fp32). Empty: not run.
"""


def _markdown(rows: Iterable[Sequence[object]]) -> str:
    """Without padding, so that a changed row changes one line."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def bad(one: Look) -> bool:
    """Whether a model differs from eager at density 1, or holds something that nobody mentions."""
    return bool(one.unmentioned) or one.density_one.startswith("BAD")


def table(looks: Iterable[Look]) -> str:
    every = sorted(looks, key=lambda one: (one.name, one.attention))
    rows = [
        (
            one.name,
            one.attention,
            one.graphs,
            *(f"{one.found.get(kind, 0)} of {one.similar.get(kind, 0)}" for kind in KINDS),
            ", ".join(dict.fromkeys(reason.partition(": ")[0] for reason in one.reasons)),
            ", ".join(one.unmentioned),
            one.density_one,
        )
        for one in every
    ]
    headers = ("model", "attention", "graphs", "attention found", "ffn found", "refused", "unmentioned", "density 1")
    checked = [one for one in every if one.density_one]
    summary = (
        f"{len({one.name for one in every})} models, {len(every)} rows. Unmentioned: {sum(len(one.unmentioned) for one in every)}. "
        f"Density 1: {sum(one.density_one.startswith('equal') for one in checked)} of {len(checked)} rows equal eager, "
        f"{sum(bad(one) for one in checked)} BAD."
    )
    reasons = sorted({reason for one in every for reason in one.reasons})
    said = "\n".join(f"- {reason}" for reason in reasons)
    head = _HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    return f"{head}\n{summary}\n\n{_markdown([headers, ['---'] * len(headers), *rows])}\n\n## What the refusals say\n\n{said}\n"
