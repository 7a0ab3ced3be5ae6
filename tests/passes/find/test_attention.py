"""Attention of whole models, in checkpoints and of nn.MultiheadAttention. Its spellings and twins have files of their own."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from sptc.ir.region import Found
from sptc.passes.find.attention import find_attention
from tests.capture import capture
from tests.models.zoo import CASES
from tests.passes.find.attention_findings import check, found_in


@functools.cache
def found_in_case(name: str) -> list[tuple[Found, dict]]:
    model, inputs = CASES[name].make()
    return found_in(capture(model, inputs))


# Every family, attention and padding, but not every combination of the three: Dynamo takes seconds for each.
WHOLE = [name for name in CASES if name.startswith(("llama", "gemma2", "gpt_oss")) or not name.endswith(("-eager", "-sdpa-padded"))]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name):
    findings = found_in_case(name)
    assert tuple(r.mask.predicate for found, _ in findings for r in found.regions) == CASES[name].attention
    assert not [r for found, _ in findings for r in found.refusals]
    for found, values in findings:
        for region in found.regions:
            check(region, values)
            assert region.mask.causal == ("k <= q" in region.mask.predicate)
            assert (region.mask.boolean, region.mask.bias, region.dropout_p) == (None, None, 0.0)


def test_grouped_heads_and_sites():
    regions = [r for found, _ in found_in_case("llama-eager-padded") for r in found.regions]
    assert [r.k.meta["val"].shape[1] for r in regions] == [2, 2] and [r.v.meta["val"].shape[1] for r in regions] == [2, 2]
    assert [r.site.module for r in regions] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(r.site.source.startswith("modeling_llama.py:") and len(r.site.owner) == 3 for r in regions)


def test_a_cache_escapes_without_taking_the_region_along():
    ((found, _),) = found_in_case("llama-sdpa-cache")
    for region in found.regions:
        assert str(region.k.target) != "aten.cat.default" and not any("cat" in node.name for node in region.nodes)


@pytest.mark.parametrize("outer", [True, False], ids=["outer", "alone"])
@pytest.mark.parametrize("name", ["llama-sdpa-padded", "bert-eager-padded"])
def test_inside_checkpoints(name, outer):
    model, inputs = CASES[name].make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    captured = capture(model, inputs)
    assert not any(find_attention(one.gm).regions for one in captured)
    bodies = [(found, values) for found, values in found_in(captured, outer) if found.regions]
    assert len(bodies) == 2
    for i, (found, values) in enumerate(bodies):
        (region,) = found.regions
        assert not found.refusals
        check(region, values)
        kept = region.mask.boolean if "sdpa" in name else region.mask.bias
        assert region.mask.predicate == (CASES[name].attention[i] if outer else "True")
        assert (kept is None) == outer and (kept is None or kept.op == "placeholder")


@pytest.mark.parametrize("name", ["bert-eager", "encoder-post", "gpt"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout_is_read_where_it_acts(name, training):
    model, inputs = CASES[name].make(dropout=0.1)
    torch.manual_seed(0)
    found = [r for one in capture(model.train(training), inputs) for r in find_attention(one.gm).regions]
    assert [r.dropout_p for r in found] == [0.1 if training else 0.0] * 2


class Weighted(nn.Module):
    """nn.MultiheadAttention as it is by default: it computes averaged weights, which the caller may drop."""

    def __init__(self, keep: bool, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)
        self.keep = keep

    def forward(self, x: Tensor, padding: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x, key_padding_mask=padding)
        return (y, weights) if self.keep else y


@pytest.mark.parametrize("batch_first", [True, False])
def test_unused_weights_of_multihead_attention(batch_first):
    torch.manual_seed(0)
    x, padding = torch.randn(2, 13, 32), torch.zeros(2, 13, dtype=torch.bool)
    padding[0, 9:] = True
    ((found, values),) = found_in(capture(Weighted(False, batch_first), {"x": x if batch_first else x.transpose(0, 1), "padding": padding}))
    (region,) = found.regions
    assert tuple(region.q.meta["val"].shape) == tuple(region.k.meta["val"].shape) == (2, 4, 13, 8)
    assert region.mask.predicate == "~t0[b, k]" and not found.refusals
    check(region, values)


def test_used_weights_of_multihead_attention():
    ((found, _),) = found_in(capture(Weighted(True, True), {"x": torch.randn(2, 13, 32), "padding": torch.zeros(2, 13, dtype=torch.bool)}))
    assert not found.regions and [r.rule for r in found.refusals] == ["escapes"]
