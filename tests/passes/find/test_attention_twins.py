"""Twins of attention, q, k and v [2, 4, 13, 8]: each is refused, for its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sptc.ir.region import Found
from tests.capture import capture
from tests.passes.find.attention_findings import found_in, qkv


def one_query_under_several_masks(q, k, v):
    return (q[:, :, :1] @ k.mT).masked_fill(torch.arange(13) > torch.arange(5)[:, None], -torch.inf).softmax(-1) @ v


def one_sequence_under_several_masks(q, k, v):
    keep = torch.arange(13) <= torch.tensor([5, 13])[:, None, None, None]
    return torch.where(keep, q[:1] @ k[:1].mT, -torch.inf).softmax(-1) @ v[:1]


def one_sequence_above_several_floors(q, k, v):
    return torch.maximum(q[:1] @ k[:1].mT, torch.full((2, 1, 1, 1), -1e9)).softmax(-1) @ v[:1]


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


def grouped_by_einsum(q, k, v):
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q.view(2, 2, 2, 13, 8), k[:, :2])
    return torch.einsum("bhgqk,bhkd->bhgqd", scores.softmax(-1), v[:, :2])


def masked_under_other_heads(q, k, v):
    scores = (q @ k.mT).view(4, 2, 13, 13)
    keep = torch.arange(13)[None, :] <= torch.arange(13)[:, None] + torch.arange(2)[:, None, None]
    return scores.masked_fill(~keep, -torch.inf).view(2, 4, 13, 13).softmax(-1) @ v


def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def scores_used_again(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.mean()


def capped_after_the_mask(q, k, v):
    masked = (q @ k.mT).masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -torch.inf)
    return (torch.tanh(masked / 30) * 30).softmax(-1) @ v


def capped_scores_used_again(q, k, v):
    scores = torch.tanh(q @ k.mT)
    return scores.softmax(-1) @ v, scores.mean()


def less_the_greatest_of_a_column(q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def sink_and_a_value(q, k, v):
    weights = torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)
    return weights @ torch.cat([v, v[:, :, :1]], 2)


def masked_with_the_sink(q, k, v):
    scores = torch.cat([q @ k.mT, q[..., :1]], -1)
    return scores.masked_fill(torch.ones(13, 14, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)[..., :-1] @ v


def sink_used_again(q, k, v):
    scores = torch.cat([q @ k.mT, q[..., :1]], -1)
    return scores.softmax(-1)[..., :-1] @ v, scores.mean()


def less_the_greatest_before_the_sink(q, k, v):
    scores = q @ k.mT
    return torch.cat([scores - scores.amax(-1, keepdim=True), q[..., :1]], -1).softmax(-1)[..., :-1] @ v


def sink_under_other_heads(q, k, v):
    q3, k3, v3 = (t.reshape(8, 13, 8) for t in (q, k, v))
    scores = torch.cat([torch.bmm(q3, k3.mT).view(1, 8, 13, 13), q3[None, :, :, :1]], -1)
    return torch.bmm(scores.view(8, 13, 14).softmax(-1)[..., :-1], v3).view(2, 4, 13, 8)


def sink_changed_in_place(q, k, v):
    column = q[..., :1].clone()
    scores = torch.cat([q @ k.mT, column], -1)
    column.zero_()
    return scores.softmax(-1)[..., :-1] @ v


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


def trainable_fused_bias(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q[:, :, :, :1].expand(-1, -1, -1, 13))


def clipped_mask(q, k, v):
    return (q @ k.mT).masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -5.0).softmax(-1) @ v


def masked_faintly(q, k, v):
    """What is left of the mask behind the division moves a score by 1."""
    return ((q @ k.mT).masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -1e4) / 1e4).softmax(-1) @ v


def mode_inside(q, k, v):
    scores = q @ k.mT
    with torch.autocast("cpu", torch.bfloat16):
        weights = scores.softmax(-1)
    return weights @ v


def keys_laid_out_otherwise(q, k, v):
    return (q @ k.permute(0, 2, 3, 1).transpose(1, 2).reshape(2, 8, 4, 13).transpose(1, 2).clone().neg()).softmax(-1) @ v


# Each with the rule of its refusal.
TWINS: dict[str, tuple[str, Callable[..., Any]]] = {
    "one_query_under_several_masks": ("shape", one_query_under_several_masks),
    "one_sequence_under_several_masks": ("shape", one_sequence_under_several_masks),
    "one_sequence_above_several_floors": ("scores", one_sequence_above_several_floors),
    "clipped_scores": ("scores", lambda q, k, v: (q @ k.mT).clamp(min=-1.0).softmax(-1) @ v),
    "clipped_on_both_sides": ("scores", lambda q, k, v: (q @ k.mT).clamp(-1e9, 1.0).softmax(-1) @ v),
    "subtracted_from_a_number": ("scores", lambda q, k, v: (1 - q @ k.mT).softmax(-1) @ v),
    "source_of_scaled_query_zeroed": ("mutated", source_of_scaled_query_zeroed),
    "scaled_key_changed_after": ("mutated", scaled_key_changed_after),
    "query_scaled_without_gradient": ("mode-boundary", query_scaled_without_gradient),
    "rounded_scores": ("scores", lambda q, k, v: (q @ k.mT * 4).to(torch.int32).float().softmax(-1) @ v),
    "rounded_weights": ("weights", lambda q, k, v: (q @ k.mT).softmax(-1).to(torch.int32).float() @ v),
    "grouped_by_einsum": ("layout", grouped_by_einsum),
    "masked_under_other_heads": ("rank", masked_under_other_heads),
    "weights_returned": ("escapes", weights_returned),
    "scores_used_again": ("escapes", scores_used_again),
    "capped_after_the_mask": ("scores", capped_after_the_mask),
    "capped_after_a_number": ("scores", lambda q, k, v: (torch.tanh(q @ k.mT + 1) * 30).softmax(-1) @ v),
    "capped_by_features": ("scale", lambda q, k, v: (torch.tanh(q @ k.mT) * v[:, :, :1, :1]).softmax(-1) @ v),
    "capped_and_turned": ("scale", lambda q, k, v: (torch.tanh(q @ k.mT) * -30).softmax(-1) @ v),
    "squared": ("scores", lambda q, k, v: (q @ k.mT).square().softmax(-1) @ v),
    "rectified": ("scores", lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v),
    "capped_scores_used_again": ("escapes", capped_scores_used_again),
    "less_the_greatest_of_a_column": ("scale", less_the_greatest_of_a_column),
    "two_sinks": ("scores", lambda q, k, v: torch.cat([q @ k.mT, q[..., :2]], -1).softmax(-1)[..., :-2] @ v),
    "sink_before": ("scores", lambda q, k, v: torch.cat([q[..., :1], q @ k.mT], -1).softmax(-1)[..., 1:] @ v),
    "sink_and_a_value": ("weights", sink_and_a_value),
    "first_key_dropped_for_a_sink": ("weights", lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., 1:] @ v),
    "scaled_with_the_sink": ("scores", lambda q, k, v: (torch.cat([q @ k.mT, q[..., :1]], -1) * 0.5).softmax(-1)[..., :-1] @ v),
    "masked_with_the_sink": ("scores", masked_with_the_sink),
    "sink_used_again": ("escapes", sink_used_again),
    "raised_before_the_sink": ("scores", lambda q, k, v: torch.cat([q @ k.mT + 3, q[..., :1]], -1).softmax(-1)[..., :-1] @ v),
    "less_the_greatest_before_the_sink": ("scores", less_the_greatest_before_the_sink),
    "sink_under_other_heads": ("rank", sink_under_other_heads),
    "flat_where_scores_are_small": ("scores", lambda q, k, v: (torch.tanh(torch.sigmoid(q @ k.mT) * 60) * 3).softmax(-1) @ v),
    "sink_changed_in_place": ("mutated", sink_changed_in_place),
    "softmax_over_queries": ("softmax-dim", lambda q, k, v: (q @ k.mT).softmax(-2) @ v),
    "softmax_over_heads": ("softmax-dim", lambda q, k, v: (q @ k.mT).softmax(1) @ v),
    "changed_scores_used_elsewhere": ("escapes", changed_scores_used_elsewhere),
    "value_changed_between": ("mutated", value_changed_between),
    "trainable_bias": ("bias-gradient", lambda q, k, v: (q @ k.mT + v[:, :, :, :1]).softmax(-1) @ v),
    "trainable_fused_bias": ("bias-gradient", trainable_fused_bias),
    "dropped_scores": ("dropout", lambda q, k, v: F.dropout(q @ k.mT, 0.1).softmax(-1) @ v),
    "dropped_twice": ("dropout", lambda q, k, v: F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.1), 0.2) @ v),
    "reweighted": ("weights", lambda q, k, v: ((q @ k.mT).softmax(-1) * v[:, :, :1, :1]) @ v),
    "scaled_per_head": ("scale", lambda q, k, v: (q @ k.mT * v[:, :, :1, :1]).softmax(-1) @ v),
    "clipped_mask": ("scores", clipped_mask),
    "masked_faintly": ("scores", masked_faintly),
    "faint_floor": ("scores", lambda q, k, v: ((q @ k.mT * 9e3).clamp(min=-1e4) / 9e3).softmax(-1) @ v),
    "two_products": ("scores", lambda q, k, v: (q @ k.mT + q @ v.mT).softmax(-1) @ v),
    "mode_inside": ("mode-boundary", mode_inside),
    "two_dimensions": ("rank", lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0])),
    "keys_laid_out_otherwise": ("layout", keys_laid_out_otherwise),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_refused(name):
    rule, twin = TWINS[name]
    ((found, _),) = found_in(capture(twin, qkv()))
    assert not found.regions
    (refusal,) = found.refusals
    assert refusal.rule == rule and refusal.kind == "attention"
    assert refusal.reason and refusal.site.source.startswith("test_attention_twins.py:")


@pytest.mark.parametrize("f", [lambda x, w: (x @ w).softmax(-1), lambda x, w: F.linear(x, w).softmax(-1) @ w], ids=["head", "router"])
def test_other_softmaxes_are_no_candidates(f):
    ((found, _),) = found_in(capture(f, {"x": torch.randn(3, 5, 7), "w": torch.randn(7, 7)}))
    assert found == Found((), ())
