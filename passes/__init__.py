"""The compiler's passes, in order."""

from sptc.passes import bind
from sptc.passes.decide import decisions
from sptc.passes.find import regions
from sptc.passes.normalize import lower
from sptc.passes.rewrite import forms

PIPELINE = (
    (lower.lower, "one ATen graph before autograd: all spellings of a layer become one language"),
    (regions.find, "regions and refusals, from the graph alone"),
    (bind.bind, "what a prepared model marked: trainable state for the regions that own it"),
    (decisions.decide, "which regions pay, and with which blocks"),
    (forms.rewrite, "regions become sparse operators; what only they used disappears"),
)

ANALYSIS, REWRITING = PIPELINE[:-1], PIPELINE[-1:]  # all that reads: `explain` and `prepare` stop before the graph is rewritten

__all__ = ["ANALYSIS", "PIPELINE", "REWRITING"]
