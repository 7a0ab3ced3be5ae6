"""One attention, q, k and v [2, 4, 13, 8], spelled in many ways: each is found whole and computes what the region says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sptc.ir.expression import parse
from sptc.passes.find.attention import find_attention
from tests.capture import capture
from tests.passes.find.attention_findings import check, found_in, qkv


def less_the_greatest(q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v


def sink_of_each_head(q, k, v):
    future = torch.full((13, 13), torch.finfo(q.dtype).min).triu(1)
    column = v[0, :, 0, 0].reshape(1, -1, 1, 1).expand(2, -1, 13, -1)
    scores = torch.cat([torch.tanh(q @ k.mT) * 2 + future, column], dim=3)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.dropout(scores.softmax(-1)[..., :13], 0.0) @ v


def soft_capped_in_place_and_masked(q, k, v):
    scores = (q * 0.5) @ k.mT
    scores.div_(2.0).tanh_().mul_(2.0)
    return scores.masked_fill_(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


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


def random_bias(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(k[:, :1].detach() @ q[:, :1].detach().mT))


# Each with the predicate of its mask.
SPELLINGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "less_the_greatest": ("True", less_the_greatest),
    "sink": ("True", lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v),
    "sink_of_each_head": ("k <= q", sink_of_each_head),
    "soft_capped": ("True", lambda q, k, v: (torch.tanh(q @ k.mT / 30) * 30).softmax(-1) @ v),
    "soft_capped_in_place_and_masked": ("k <= q", soft_capped_in_place_and_masked),
    "bent_twice": ("True", lambda q, k, v: ((q @ k.mT).sigmoid() * 3).erf().mul(4).softmax(-1) @ v),
    "filled_with_a_tensor": ("k <= q", filled_with_a_tensor),
    "all_raised_by_a_number": ("k <= q", all_raised_by_a_number),
    "raised_to_the_least_number": ("k <= q", raised_to_the_least_number),
    "scaled_query": ("True", lambda q, k, v: F.softmax((q * 0.3) @ k.transpose(-2, -1), -1) @ v),
    "scaled_both": ("True", lambda q, k, v: F.softmax((q / 2) @ (k * 0.5).mT, dim=-1) @ v),
    "scaled_scores_and_query": ("True", lambda q, k, v: ((q * 0.5) @ k.permute(0, 1, 3, 2) / math.sqrt(8)).softmax(3) @ v),
    "scaled_by_a_tensor": ("True", lambda q, k, v: F.softmax(q @ k.mT / torch.full([], 8**0.5), -1) @ v),
    "float_softmax": ("True", lambda q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v),
    "filled": ("k <= q", filled),
    "filled_in_place": ("k <= q", filled_in_place),
    "where": ("k <= q", where),
    "added_then_scaled": ("k <= q", lambda q, k, v: ((q @ k.mT + torch.full((13, 13), -torch.inf).triu(1)) * 0.3).softmax(-1) @ v),
    "subtracted": ("k <= q", lambda q, k, v: (q @ k.mT - 1e9 * (1.0 - torch.ones(13, 13).tril())).softmax(-1) @ v),
    "merged_views": ("k <= q", merged_views),
    "added_by_the_product": ("k <= q", added_by_the_product),
    "interleaved_heads": ("k <= q", interleaved_heads),
    "grouped_by_the_operator": ("True", grouped_by_the_operator),
    "one_key_head": ("True", one_key_head),
    "cross": ("k <= q", lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :5], k, v, is_causal=True)),
    "random_bias": ("True", random_bias),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    predicate, spelling = SPELLINGS[name]
    ((found, values),) = found_in(capture(spelling, qkv()))
    assert not found.refusals
    (region,) = found.regions
    assert region.mask.predicate == predicate
    heads = {"interleaved_heads": 2, "grouped_by_the_operator": 2, "one_key_head": 1}.get(name, 4)
    assert region.k.meta["val"].shape[1] == region.v.meta["val"].shape[1] == heads
    check(region, values)


@pytest.mark.parametrize(
    ("name", "scale", "transform"),
    [("soft_capped", 1.0, "30*tanh(0.033333333333333333*u0)"), ("soft_capped_in_place_and_masked", 0.5, "2*tanh(0.5*u0)")],
)
def test_a_soft_cap_is_a_function_of_the_scores_as_they_are(name, scale, transform):
    """Its slope at 0 is 1, so that the scale is the scores' own, by which blocks are chosen."""
    ((found, _),) = found_in(capture(SPELLINGS[name][1], qkv()))
    (region,) = found.regions
    assert region.scale == pytest.approx(scale, rel=1e-15) and parse(region.transform) == parse(transform)


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


def test_heads_repeated_in_another_order_are_no_groups():
    def repeated(q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :2].repeat(1, 2, 1, 1), v)

    ((found, values),) = found_in(capture(repeated, qkv()))
    (region,) = found.regions
    assert region.k.meta["val"].shape[1] == 4
    check(region, values)


# Attention by einsum, in layouts [b, h, n, d] and [b, n, h, d].


def einsum_heads_last(q, k, v):
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    future = torch.ones(13, 13, dtype=torch.bool).triu(1)
    scores = torch.einsum("blhe,bshe->bhls", q, k).masked_fill(future, -torch.inf)
    return torch.einsum("bhls,bshd->blhd", (0.3 * scores).softmax(-1), v)


def einsum_ellipsis(q, k, v):
    return torch.einsum("... i j, ... j d -> ... i d", torch.einsum("...id,...jd->...ij", q * 0.5, k).softmax(-1), v)


EINSUMS: dict[str, tuple[str, Callable[..., Any]]] = {
    "einsum_heads_first": ("True", lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)),
    "einsum_heads_last": ("k <= q", einsum_heads_last),
    "einsum_ellipsis": ("True", einsum_ellipsis),
    "einsum_keys_first": ("True", lambda q, k, v: torch.einsum("zyjx,zyij->zyix", v, torch.einsum("zyjx,zyix->zyij", k, q).softmax(-1))),
    "einsum_keys_transposed": ("True", lambda q, k, v: torch.einsum("bhqd,bhdk->bhqk", q, k.transpose(2, 3)).softmax(-1) @ v),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_attention(name):
    (predicate, spelling), given = EINSUMS[name], qkv()
    (captured,) = capture(spelling, given)
    torch.testing.assert_close(captured.gm(*captured.inputs)[0], spelling(**given))
    ((found, values),) = found_in([captured])
    (region,) = found.regions
    assert not found.refusals and region.mask.predicate == predicate
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
