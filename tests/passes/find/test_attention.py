"""Every spelling of attention is found whole and computes what the region says; twins are refused, each for its reason."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sptc.ir.expression import parse
from sptc.ir.region import AttentionRegion, Found
from sptc.passes.find.attention import find_attention
from sptc.passes.graph.boundary import breach
from sptc.passes.graph.frame import checkpoint_bodies
from tests.capture import Captured, capture, node_values
from tests.models.zoo import CASES
from tests.passes.attention_semantics import compute


def check(region: AttentionRegion, values) -> None:
    """The region computes its y, and is closed."""
    expected, seen = compute(region, values)
    actual = values[region.y].double()
    torch.testing.assert_close(actual[seen], expected[seen], rtol=1e-5, atol=1e-6)
    assert seen.any() and breach(region.nodes, region.y) is None
    assert region.y in region.nodes and region.nodes.isdisjoint({region.q, region.k, region.v})


def found_in(captured: list[Captured], outer: bool = True) -> list[tuple[Found, dict]]:
    """Findings and node values of every graph, checkpoint bodies after the graph around them."""
    result = []
    for one in captured:
        values = node_values(one)
        result.append((find_attention(one.gm), values))
        for call, body in checkpoint_bodies(one.gm):
            placeholders = body.graph.find_nodes(op="placeholder")
            around = dict(zip(placeholders, call.args[1:], strict=True))
            result.append((find_attention(body, around if outer else None), values))
    return result


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


# One attention, spelled in many ways: q [2, 4, 13, 8], k and v [2, 4, 13, 8].


def scaled_query(q, k, v):
    return F.softmax((q * 0.3) @ k.transpose(-2, -1), -1) @ v


def scaled_both(q, k, v):
    return F.softmax((q / 2) @ (k * 0.5).mT, dim=-1) @ v


def scaled_scores_and_query(q, k, v):
    return ((q * 0.5) @ k.permute(0, 1, 3, 2) / math.sqrt(8)).softmax(3) @ v


def scaled_by_a_tensor(q, k, v):
    return F.softmax(q @ k.mT / torch.full([], 8**0.5), -1) @ v


def float_softmax(q, k, v):
    return F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v


def filled(q, k, v):
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(future, -1e9).softmax(-1) @ v


def filled_in_place(q, k, v):
    scores = q @ k.mT
    scores.masked_fill_(~torch.ones(13, 13, dtype=torch.bool).tril(), -torch.inf)
    scores *= 0.4
    return scores.softmax(-1) @ v


def where(q, k, v):
    keep = torch.arange(13)[None, :] <= torch.arange(13)[:, None]
    scores = q @ k.mT
    return torch.where(keep, scores, torch.finfo(scores.dtype).min).softmax(-1) @ v


def added_then_scaled(q, k, v):
    return ((q @ k.mT + torch.full((13, 13), -torch.inf).triu(1)) * 0.3).softmax(-1) @ v


def subtracted(q, k, v):
    return (q @ k.mT - 1e9 * (1.0 - torch.ones(13, 13).tril())).softmax(-1) @ v


def merged_views(q, k, v):
    q3, k3, v3 = (t.reshape(8, 13, 8) for t in (q, k, v))
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(2, 4, 13, 13) + torch.full((13, 13), -torch.inf).triu(1)
    weights = scores.view(8, 13, 13).softmax(-1)
    return torch.bmm(weights, v3).view(2, 4, 13, 8)


def added_by_the_product(q, k, v):
    q3, k3, v3 = (t.reshape(8, 13, 8) for t in (q, k, v))
    scores = torch.baddbmm(torch.full((13, 13), -torch.inf).triu(1), q3, k3.mT, beta=1, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v3).view(2, 4, 13, 8)


def interleaved_heads(q, k, v):
    k, v = k[:, :2], v[:, :2]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)


def grouped_by_the_operator(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True, scale=0.2)


def one_key_head(q, k, v):
    k, v = k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1)
    return (q @ k.mT).softmax(-1) @ v


def cross(q, k, v):
    return F.scaled_dot_product_attention(q[:, :, :5], k, v, is_causal=True)


def random_bias(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(k[:, :1].detach() @ q[:, :1].detach().mT))


def filled_with_a_tensor(q, k, v):
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    lowest = torch.tensor(torch.finfo(q.dtype).min)  # Dynamo detaches it in place
    return torch.where(future, lowest, q @ k.mT).softmax(-1) @ v


def all_raised_by_a_number(q, k, v):
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    return ((q @ k.mT).masked_fill(future, -1e9) + 3 - 1.5).softmax(-1) @ v


def raised_to_the_least_number(q, k, v):
    future = torch.zeros(13, 13).masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), torch.finfo(q.dtype).min)
    return torch.max(q @ k.mT + future, torch.tensor(torch.finfo(q.dtype).min)).clamp(min=-1e30).softmax(-1) @ v


def soft_capped(q, k, v):
    return (torch.tanh(q @ k.mT / 30) * 30).softmax(-1) @ v


def soft_capped_in_place_and_masked(q, k, v):
    scores = (q * 0.5) @ k.mT
    scores.div_(2.0).tanh_().mul_(2.0)
    return scores.masked_fill_(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


def bent_twice(q, k, v):
    return ((q @ k.mT).sigmoid() * 3).erf().mul(4).softmax(-1) @ v


def less_the_greatest(q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


def sink(q, k, v):
    return torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v


def sink_of_each_head(q, k, v):
    future = torch.full((13, 13), torch.finfo(q.dtype).min).triu(1)
    column = v[0, :, 0, 0].reshape(1, -1, 1, 1).expand(2, -1, 13, -1)
    scores = torch.cat([torch.tanh(q @ k.mT) * 2 + future, column], dim=3)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.dropout(scores.softmax(-1)[..., :13], 0.0) @ v


SPELLINGS = {
    less_the_greatest: "True",
    sink: "True",
    sink_of_each_head: "k <= q",
    soft_capped: "True",
    soft_capped_in_place_and_masked: "k <= q",
    bent_twice: "True",
    filled_with_a_tensor: "k <= q",
    all_raised_by_a_number: "k <= q",
    raised_to_the_least_number: "k <= q",
    scaled_query: "True",
    scaled_both: "True",
    scaled_scores_and_query: "True",
    scaled_by_a_tensor: "True",
    float_softmax: "True",
    filled: "k <= q",
    filled_in_place: "k <= q",
    where: "k <= q",
    added_then_scaled: "k <= q",
    subtracted: "k <= q",
    merged_views: "k <= q",
    added_by_the_product: "k <= q",
    interleaved_heads: "k <= q",
    grouped_by_the_operator: "True",
    one_key_head: "True",
    cross: "k <= q",
    random_bias: "True",
}


# What is written to in place is found as it is where the scores read it.


def query_scaled_in_place(q, k, v):
    q = q.clone()
    q *= 0.3
    return (q @ k.mT).softmax(-1) @ v + q.clone()


def source_zeroed_after_a_copy(q, k, v):
    cache = k.clone()
    kept = cache.clone()
    cache.zero_()
    return (q @ kept.mT).softmax(-1) @ v


@pytest.mark.parametrize("model", [query_scaled_in_place, source_zeroed_after_a_copy], ids=lambda f: f.__name__)
def test_operands_written_in_place(model):
    ((found, values),) = found_in(capture(model, qkv()))
    (region,) = found.regions
    assert region.scale == 1.0
    check(region, values)


# Attention by einsum, in layouts [b, h, n, d] and [b, n, h, d].


def einsum_heads_first(q, k, v):
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def einsum_heads_last(q, k, v):
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    scores = torch.einsum("blhe,bshe->bhls", q, k).masked_fill(future, -torch.inf)
    return torch.einsum("bhls,bshd->blhd", (0.3 * scores).softmax(-1), v)


def einsum_ellipsis(q, k, v):
    return torch.einsum("... i j, ... j d -> ... i d", torch.einsum("...id,...jd->...ij", q * 0.5, k).softmax(-1), v)


def einsum_keys_first(q, k, v):
    return torch.einsum("zyjx,zyij->zyix", v, torch.einsum("zyjx,zyix->zyij", k, q).softmax(-1))


def einsum_keys_transposed(q, k, v):
    return torch.einsum("bhqd,bhdk->bhqk", q, k.transpose(2, 3)).softmax(-1) @ v


EINSUMS = [einsum_heads_first, einsum_heads_last, einsum_ellipsis, einsum_keys_first, einsum_keys_transposed]


@pytest.mark.parametrize("spelling", EINSUMS, ids=lambda f: f.__name__)
def test_einsum_attention(spelling):
    given = qkv()
    (captured,) = capture(spelling, given)
    torch.testing.assert_close(captured.gm(*captured.inputs)[0], spelling(**given))
    ((found, values),) = found_in([captured])
    (region,) = found.regions
    assert not found.refusals and region.mask.predicate == ("k <= q" if spelling is einsum_heads_last else "True")
    assert {tuple(node.meta["val"].shape) for node in (region.q, region.k, region.v)} == {(2, 4, 13, 8)}
    check(region, values)


def test_what_is_no_matrix_product_stays_an_einsum():
    def model(x, w):
        diagonal = torch.einsum("bii,bij->bj", x @ x.mT, x)
        projected = torch.einsum("bnd,de->bne", x, w)  # no batch: a linear layer
        outer = torch.einsum("bn,bm->bnm", diagonal, diagonal)
        broadcast = torch.einsum("bnd,bmd->bnm", x[:, :, :1], x)
        return projected, outer, broadcast

    (captured,) = capture(model, {"x": torch.randn(2, 5, 7), "w": torch.randn(7, 3)})
    assert sum("einsum" in str(node.target) for node in captured.gm.graph.nodes) == 4


def test_a_lowered_einsum_still_has_a_gradient():
    def model(q, k, v):
        bias = torch.einsum("bhqd,bhkd->bhqk", k, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    (captured,) = capture(model, qkv())
    found = find_attention(captured.gm)
    assert not found.regions and [r.rule for r in found.refusals] == ["bias-gradient"]


def qkv(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(2, 4, 13, 8, requires_grad=True) for name in "qkv"}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(spelling):
    ((found, values),) = found_in(capture(spelling, qkv()))
    assert not found.refusals
    (region,) = found.regions
    assert region.mask.predicate == SPELLINGS[spelling]
    heads = {interleaved_heads: 2, grouped_by_the_operator: 2, one_key_head: 1}.get(spelling, 4)
    assert region.k.meta["val"].shape[1] == region.v.meta["val"].shape[1] == heads
    check(region, values)


def test_a_soft_cap_is_a_function_of_the_scores_as_they_are():
    """Its slope at 0 is 1, so that the scale is the scores' own, by which blocks are chosen."""
    for spelling, scale, transform in (
        (soft_capped, 1.0, "30*tanh(0.033333333333333333*u0)"),
        (soft_capped_in_place_and_masked, 0.5, "2*tanh(0.5*u0)"),
    ):
        ((found, _),) = found_in(capture(spelling, qkv()))
        (region,) = found.regions
        assert region.scale == pytest.approx(scale, rel=1e-15) and parse(region.transform) == parse(transform)


# Twins: almost attention.


def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def scores_used_again(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.mean()


def capped_after_the_mask(q, k, v):
    masked = (q @ k.mT).masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf)
    return (torch.tanh(masked / 30) * 30).softmax(-1) @ v


def capped_after_a_number(q, k, v):
    return (torch.tanh(q @ k.mT + 1) * 30).softmax(-1) @ v


def capped_by_features(q, k, v):
    return (torch.tanh(q @ k.mT) * v[:, :, :1, :1]).softmax(-1) @ v


def capped_and_turned(q, k, v):
    return (torch.tanh(q @ k.mT) * -30).softmax(-1) @ v


def squared(q, k, v):
    return (q @ k.mT).square().softmax(-1) @ v


def rectified(q, k, v):
    return (q @ k.mT).relu().softmax(-1) @ v


def capped_scores_used_again(q, k, v):
    scores = torch.tanh(q @ k.mT)
    return scores.softmax(-1) @ v, scores.mean()


def less_the_greatest_of_a_column(q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def two_sinks(q, k, v):
    return torch.cat([q @ k.mT, q[..., :2]], -1).softmax(-1)[..., :-2] @ v


def sink_before(q, k, v):
    return torch.cat([q[..., :1], q @ k.mT], -1).softmax(-1)[..., 1:] @ v


def sink_and_a_value(q, k, v):
    weights = torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)
    return weights @ torch.cat([v, v[:, :, :1]], 2)


def first_key_dropped_for_a_sink(q, k, v):
    return torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., 1:] @ v


def scaled_with_the_sink(q, k, v):
    return (torch.cat([q @ k.mT, q[..., :1]], -1) * 0.5).softmax(-1)[..., :-1] @ v


def masked_with_the_sink(q, k, v):
    scores = torch.cat([q @ k.mT, q[..., :1]], -1)
    return scores.masked_fill(torch.ones(13, 14, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)[..., :-1] @ v


def sink_used_again(q, k, v):
    scores = torch.cat([q @ k.mT, q[..., :1]], -1)
    return scores.softmax(-1)[..., :-1] @ v, scores.mean()


def sink_changed_in_place(q, k, v):
    column = q[..., :1].clone()
    scores = torch.cat([q @ k.mT, column], -1)
    column.zero_()
    return scores.softmax(-1)[..., :-1] @ v


def raised_before_the_sink(q, k, v):
    return torch.cat([q @ k.mT + 3, q[..., :1]], -1).softmax(-1)[..., :-1] @ v


def less_the_greatest_before_the_sink(q, k, v):
    scores = q @ k.mT
    return torch.cat([scores - scores.amax(-1, keepdim=True), q[..., :1]], -1).softmax(-1)[..., :-1] @ v


def sink_under_other_heads(q, k, v):
    q3, k3, v3 = (t.reshape(8, 13, 8) for t in (q, k, v))
    scores = torch.cat([torch.bmm(q3, k3.mT).view(1, 8, 13, 13), q3[None, :, :, :1]], -1)
    return torch.bmm(scores.view(8, 13, 14).softmax(-1)[..., :-1], v3).view(2, 4, 13, 8)


def flat_where_scores_are_small(q, k, v):
    return (torch.tanh(torch.sigmoid(q @ k.mT) * 60) * 3).softmax(-1) @ v


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def changed_scores_used_elsewhere(q, k, v):
    scores = q @ k.mT
    copy = scores.view(2, 4, -1)
    scores.mul_(0.5)
    return scores.softmax(-1) @ v, copy.sum()


def value_changed_between(q, k, v):
    v = v.clone()
    weights = (q @ k.mT).softmax(-1)
    v.mul_(2)
    return weights @ v


def trainable_bias(q, k, v):
    return (q @ k.mT + v[:, :, :, :1]).softmax(-1) @ v


def trainable_fused_bias(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q[:, :, :, :1].expand(-1, -1, -1, 13))


def clipped_scores(q, k, v):
    return (q @ k.mT).clamp(min=-1.0).softmax(-1) @ v


def clipped_on_both_sides(q, k, v):
    return (q @ k.mT).clamp(-1e9, 1.0).softmax(-1) @ v


def subtracted_from_a_number(q, k, v):
    return (1 - q @ k.mT).softmax(-1) @ v


def dropped_scores(q, k, v):
    return F.dropout(q @ k.mT, 0.1).softmax(-1) @ v


def dropped_twice(q, k, v):
    return F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.1), 0.2) @ v


def reweighted(q, k, v):
    return ((q @ k.mT).softmax(-1) * v[:, :, :1, :1]) @ v


def scaled_per_head(q, k, v):
    return (q @ k.mT * v[:, :, :1, :1]).softmax(-1) @ v


def clipped_mask(q, k, v):
    return (q @ k.mT).masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -5.0).softmax(-1) @ v


def two_products(q, k, v):
    return (q @ k.mT + q @ v.mT).softmax(-1) @ v


def mode_inside(q, k, v):
    scores = q @ k.mT
    with torch.autocast("cpu", torch.bfloat16):
        weights = scores.softmax(-1)
    return weights @ v


def two_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q[0], k[0], v[0])


def keys_laid_out_otherwise(q, k, v):
    return (q @ k.permute(0, 2, 3, 1).transpose(1, 2).reshape(2, 8, 4, 13).transpose(1, 2).clone().neg()).softmax(-1) @ v


def repeated_in_another_order(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2].repeat(1, 2, 1, 1), v)


def source_of_scaled_query_zeroed(q, k, v):
    source = q.clone()
    scaled = source * 0.5
    source.zero_()
    return (scaled @ k.mT).softmax(-1) @ v


def scaled_key_changed_after(q, k, v):
    scaled = k * 0.5
    scaled[:, :, 0] = 0
    return (q @ scaled.mT).softmax(-1) @ v


def query_scaled_without_gradient(q, k, v):
    with torch.no_grad():
        scaled = q * 0.5
    return (scaled @ k.mT).softmax(-1) @ v


def rounded_scores(q, k, v):
    return (q @ k.mT * 4).to(torch.int32).float().softmax(-1) @ v


def rounded_weights(q, k, v):
    return (q @ k.mT).softmax(-1).to(torch.int32).float() @ v


def grouped_by_einsum(q, k, v):
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q.view(2, 2, 2, 13, 8), k[:, :2])
    return torch.einsum("bhgqk,bhkd->bhgqd", scores.softmax(-1), v[:, :2])


def masked_under_other_heads(q, k, v):
    scores = (q @ k.mT).view(4, 2, 13, 13)
    keep = torch.arange(13)[None, :] <= torch.arange(13)[:, None] + torch.arange(2)[:, None, None]
    return scores.masked_fill(~keep, -torch.inf).view(2, 4, 13, 13).softmax(-1) @ v


def one_query_under_several_masks(q, k, v):
    return (q[:, :, :1] @ k.mT).masked_fill(torch.arange(13) > torch.arange(5)[:, None], -torch.inf).softmax(-1) @ v


def one_sequence_under_several_masks(q, k, v):
    keep = torch.arange(13) <= torch.tensor([5, 13])[:, None, None, None]
    return torch.where(keep, q[:1] @ k[:1].mT, -torch.inf).softmax(-1) @ v[:1]


def one_sequence_above_several_floors(q, k, v):
    return torch.maximum(q[:1] @ k[:1].mT, torch.full((2, 1, 1, 1), -1e9)).softmax(-1) @ v[:1]


TWINS = {
    one_query_under_several_masks: "shape",
    one_sequence_under_several_masks: "shape",
    one_sequence_above_several_floors: "scores",
    clipped_scores: "scores",
    clipped_on_both_sides: "scores",
    subtracted_from_a_number: "scores",
    source_of_scaled_query_zeroed: "mutated",
    scaled_key_changed_after: "mutated",
    query_scaled_without_gradient: "mode-boundary",
    rounded_scores: "scores",
    rounded_weights: "weights",
    grouped_by_einsum: "layout",
    masked_under_other_heads: "rank",
    weights_returned: "escapes",
    scores_used_again: "escapes",
    capped_after_the_mask: "scores",
    capped_after_a_number: "scores",
    capped_by_features: "scale",
    capped_and_turned: "scale",
    squared: "scores",
    rectified: "scores",
    capped_scores_used_again: "escapes",
    less_the_greatest_of_a_column: "scale",
    two_sinks: "scores",
    sink_before: "scores",
    sink_and_a_value: "weights",
    first_key_dropped_for_a_sink: "weights",
    scaled_with_the_sink: "scores",
    masked_with_the_sink: "scores",
    sink_used_again: "escapes",
    raised_before_the_sink: "scores",
    less_the_greatest_before_the_sink: "scores",
    sink_under_other_heads: "rank",
    flat_where_scores_are_small: "scores",
    sink_changed_in_place: "mutated",
    softmax_over_queries: "softmax-dim",
    softmax_over_heads: "softmax-dim",
    changed_scores_used_elsewhere: "escapes",
    value_changed_between: "mutated",
    trainable_bias: "bias-gradient",
    trainable_fused_bias: "bias-gradient",
    dropped_scores: "dropout",
    dropped_twice: "dropout",
    reweighted: "weights",
    scaled_per_head: "scale",
    clipped_mask: "scores",
    two_products: "scores",
    mode_inside: "mode-boundary",
    two_dimensions: "rank",
    keys_laid_out_otherwise: "layout",
}


@pytest.mark.parametrize("twin", TWINS, ids=lambda f: f.__name__)
def test_twins_are_refused(twin):
    ((found, _),) = found_in(capture(twin, qkv()))
    assert not found.regions
    (refusal,) = found.refusals
    assert refusal.rule == TWINS[twin] and refusal.kind == "attention"
    assert refusal.reason and refusal.site.source.startswith("test_attention.py:")


def test_heads_repeated_in_another_order_are_no_groups():
    ((found, values),) = found_in(capture(repeated_in_another_order, qkv()))
    (region,) = found.regions
    assert region.k.meta["val"].shape[1] == 4
    check(region, values)


@pytest.mark.parametrize("f", [lambda x, w: (x @ w).softmax(-1), lambda x, w: F.linear(x, w).softmax(-1) @ w], ids=["head", "router"])
def test_other_softmaxes_are_no_candidates(f):
    ((found, _),) = found_in(capture(f, {"x": torch.randn(3, 5, 7), "w": torch.randn(7, 7)}))
    assert found == Found((), ())


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
