"""Masks are read to predicates that allow exactly what the model's own mask tensor allows; what can't be read stays a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sptc.ir.region import AttentionRegion, Mask
from sptc.passes.find.attention import find_attention
from tests.capture import capture, node_values
from tests.passes.attention_semantics import allowed

B, H, N, M = 2, 3, 13, 17
MIN = torch.finfo(torch.float32).min


def inputs(m: int = N, **more: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    return {"q": torch.randn(B, H, N, 8), "k": torch.randn(B, H, m, 8), "v": torch.randn(B, H, m, 8), **more}


def masked(build: Callable[..., Tensor]) -> Callable[..., Any]:
    """Attention under the mask that `build` makes from the extra inputs; the mask is returned too."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
        mask = build(**more)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), mask

    return attend


def read(build: Callable[..., Tensor], given: dict[str, Any], **options: Any) -> tuple[AttentionRegion, dict, Tensor]:
    """The region, the node values and the mask tensor that the model builds."""
    (captured,) = capture(masked(build), given, **options)
    found = find_attention(captured.gm)
    assert not found.refusals
    more = {name: value for name, value in given.items() if name not in "qkv"}
    return found.regions[0], node_values(captured), build(**more)


def agrees(mask: Mask, values: dict, built: Tensor, n: int = N, m: int = N) -> None:
    """The predicate and the operands allow what the built tensor allows."""
    ours = allowed(mask, values, (B, H, n, m))
    truth = built if built.dtype == torch.bool else built > -1e4
    assert truth.any() and not truth.all()
    torch.testing.assert_close(ours, truth.expand(B, H, n, m))
    assert not mask.seeing or truth.any(-1).all()


def positions() -> tuple[Tensor, Tensor]:
    return torch.arange(N)[:, None], torch.arange(N)[None, :]


def padding(kind: torch.dtype = torch.int64) -> Tensor:
    torch.manual_seed(5)
    return (torch.rand(B, N) < 0.7).to(kind)


def causal_by_triangle():
    return torch.ones(N, N, dtype=torch.bool).tril()


def causal_by_infinities():
    return torch.triu(torch.full((N, N), -torch.inf), diagonal=1)


def causal_by_triangle_of_floats():
    return (torch.tril(torch.ones(N, N)) == 0).float() * -1e9


def window():
    q, k = positions()
    return (k <= q) & (k > q - 4)


def two_sided_window():
    q, k = positions()
    return (q - k).abs() <= 3


def chunks():
    q, k = positions()
    return (k // 4 == q // 4) & (k <= q)


def dilated():
    q, k = positions()
    return (q - k) % 3 == 0


def strided_heads():
    q, k = positions()
    head = torch.arange(H)[:, None, None]
    return k <= q + head


def flipped():
    return torch.ones(N, N, dtype=torch.bool).triu().flip(0)


def narrowed():
    return torch.ones(N + 4, N + 4, dtype=torch.bool).tril().narrow(0, 4, N).narrow(1, -N, N)


def exclusive_or():
    q, k = positions()
    return torch.logical_xor(k <= q, k < 3)


def global_tokens():
    q, k = positions()
    return (k < 2) | (q < 2) | ((k <= q) & (k > q - 3))


def first_and_last():
    """At the bounds of the positions, where what is known of them must be exact."""
    q, k = positions()
    return (k == 0) | (k >= N - 1) | ((q < N - 1) & (k < N) & (q >= 0) & (k <= q))


def by_where():
    q, k = positions()
    return torch.where(k > q, MIN, torch.zeros(()))


def filled_in_place():
    mask = torch.zeros(N, N)
    mask.masked_fill_(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    return mask[None, None]


POSITIONS = {
    causal_by_triangle: "k <= q",
    causal_by_infinities: "k <= q",
    causal_by_triangle_of_floats: "k <= q",
    window: "(k <= q) & (k > (q - 4))",
    two_sided_window: "(q <= (k + 3)) & (k <= (q + 3))",
    chunks: "((k // 4) == (q // 4)) & (k <= q)",
    dilated: "((q - k) % 3) == 0",
    strided_heads: "k <= (q + h)",
    flipped: "(k + q) >= 12",
    narrowed: "k <= q",
    exclusive_or: None,
    global_tokens: "((k < 2) | (q < 2)) | ((k <= q) & (k > (q - 3)))",
    first_and_last: "((k == 0) | (k >= 12)) | ((q < 12) & (k <= q))",
    by_where: "k <= q",
    filled_in_place: "k <= q",
}


@pytest.mark.parametrize("build", POSITIONS, ids=lambda f: f.__name__)
def test_positions(build):
    region, values, built = read(build, inputs())
    mask = region.mask
    assert (mask.tensors, mask.boolean, mask.bias) == ((), None, None)
    assert POSITIONS[build] in (None, mask.predicate)
    assert mask.causal == mask.predicate.startswith("k <= q") or "& (k <= q)" in mask.predicate or "(k <= q) &" in mask.predicate
    agrees(mask, values, built)


def keys(seen):
    return seen[:, None, None, :].expand(B, 1, N, N) != 0


def keys_by_index(seen):
    return seen.bool()[torch.arange(B)[:, None, None, None], torch.arange(N)[None, None, None, :]].expand(B, 1, N, N)


def keys_by_difference(seen):
    return (1.0 - seen[:, None, None, :].to(torch.float32)) * MIN


def keys_filled_by_difference(seen):
    inverted = 1.0 - seen[:, None, None, :].expand(B, 1, N, N).to(torch.float32)
    return inverted.masked_fill(inverted.to(torch.bool), MIN)


def keys_and_causal(seen):
    return torch.full((N, N), MIN).triu(1) + (1.0 - seen[:, None, None, :].to(torch.float32)) * MIN


def keys_and_queries(seen):
    return seen[:, None, :, None].bool() & seen[:, None, None, :].bool() & torch.ones(N, N, dtype=torch.bool).tril()


def merged_heads(seen):
    mask = seen.view(B, 1, 1, N).expand(-1, H, -1, -1).reshape(B * H, 1, N) == 0
    return torch.zeros(B * H, N, N).masked_fill(mask, -torch.inf).view(B, H, N, N)


def documents(seen):
    document = seen.cumsum(-1)
    return document[:, None, :, None] == document[:, None, None, :]


PADDINGS = {
    keys: "t0[b, k] != 0",
    keys_by_index: "t0[b, k] != 0",
    keys_by_difference: "t0[b, k] != 0",
    keys_filled_by_difference: "t0[b, k] == 1",
    keys_and_causal: "(k <= q) & (t0[b, k] != 0)",
    keys_and_queries: "((t0[b, q] != 0) & (t0[b, k] != 0)) & (k <= q)",
    merged_heads: "t0[b, k] != 0",
    documents: "t0[b, q] == t0[b, k]",
}


@pytest.mark.parametrize("build", PADDINGS, ids=lambda f: f.__name__)
def test_padding(build):
    region, values, built = read(build, inputs(seen=padding()))
    assert region.mask.predicate == PADDINGS[build]
    assert len(region.mask.tensors) == 1 and (region.mask.boolean, region.mask.bias) == (None, None)
    agrees(region.mask, values, built)


def test_boolean_and_float_padding():
    region, values, built = read(keys, inputs(seen=padding(torch.bool)))
    assert region.mask.predicate == "t0[b, k]" or region.mask.predicate == "t0[b, k] != 0"
    agrees(region.mask, values, built)
    region, values, built = read(keys, inputs(seen=padding(torch.float32)))
    kept = region.mask.boolean  # the grammar compares integers: the comparison itself stays a tensor
    assert kept is not None and kept.meta["val"].dtype == torch.bool
    agrees(region.mask, values, built)


def test_a_longer_key_side_is_aligned_at_either_end():
    def at_the_start():
        return torch.ones(N, M, dtype=torch.bool).tril()

    def at_the_end():
        return torch.ones(N, M, dtype=torch.bool).tril(M - N)

    region, values, built = read(at_the_start, inputs(M))
    assert (region.mask.predicate, region.mask.causal) == ("k <= q", False)
    agrees(region.mask, values, built, N, M)
    region, values, built = read(at_the_end, inputs(M))
    assert (region.mask.predicate, region.mask.causal) == ("k <= (q + 4)", True)
    agrees(region.mask, values, built, N, M)


def test_symbolic_lengths_become_sizes():
    def attend(x: Tensor, seen: Tensor) -> Tensor:
        n = x.shape[2]
        at = torch.arange(n)
        keep = (at[None, :] <= at[:, None]) & (at[None, :] >= n - 5) & seen[:, None, None, :]
        return F.scaled_dot_product_attention(x, x * 2, x * 3, attn_mask=keep)

    given = {"x": torch.randn(B, H, N, 8), "seen": padding(torch.bool)}
    torch._dynamo.mark_dynamic(given["x"], 2)
    torch._dynamo.mark_dynamic(given["seen"], 1)
    (captured,) = capture(attend, given)
    (region,) = find_attention(captured.gm).regions
    assert region.mask.predicate == "((k <= q) & (k >= (s0 - 5))) & t0[b, k]"
    assert len(region.mask.sizes) == 1 and region.mask.causal
    q, k = positions()
    truth = (k <= q) & (k >= N - 5) & padding(torch.bool)[:, None, None, :]
    agrees(region.mask, node_values(captured), truth)


def test_a_mask_given_whole_stays_an_operand():
    given = torch.rand(B, 1, N, N) < 0.5
    region, values, built = read(lambda given: given, inputs(given=given))
    assert region.mask.boolean is not None and region.mask.predicate == "True"
    agrees(region.mask, values, built)
    region, _, _ = read(lambda given: given.float(), inputs(given=given.float()))
    assert region.mask.bias is not None and region.mask.predicate == "True" and region.mask.boolean is None


def test_what_reads_is_split_from_what_does_not():
    def build(given):
        q, k = positions()
        return given & (k <= q)

    region, values, built = read(build, inputs(given=torch.rand(B, 1, N, N) < 0.7))
    assert (region.mask.predicate, region.mask.causal) == ("k <= q", True)
    assert region.mask.boolean is not None and region.mask.boolean.op == "placeholder"
    agrees(region.mask, values, built)


def test_a_bias_under_a_mask_is_split():
    def build(given):
        q, k = positions()
        return given.masked_fill(k > q, -torch.inf)

    region, values, built = read(build, inputs(given=torch.randn(N, N)))
    assert region.mask.predicate == "k <= q" and region.mask.bias is not None and region.mask.bias.op == "placeholder"
    agrees(region.mask, values, built)


def folded():
    return torch.ones(N + 9, N, dtype=torch.bool).tril().reshape(N, N + 9)[:, :N]


def folded_to_as_many_axes():
    return (torch.arange(3 * N).view(3, N) % 7 < 5).view(N, 3)[:, :1].expand(N, N)


@pytest.mark.parametrize("build", [folded, folded_to_as_many_axes], ids=lambda f: f.__name__)
def test_a_view_of_other_sizes_moves_positions(build):
    region, values, built = read(build, inputs())
    agrees(region.mask, values, built)


def test_a_padding_mask_folded_into_windows():
    keep = padding(torch.bool)[:, : N - 1].reshape(3, 8)
    keep[:, ::4] = True

    def attend(x, keep):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=keep.view(6, 4)[:, None, None, :])

    (captured,) = capture(attend, {"x": torch.randn(6, H, 4, 8), "keep": keep})
    (region,) = find_attention(captured.gm).regions
    truth = keep.view(6, 1, 1, 4).expand(6, H, 4, 4)
    torch.testing.assert_close(allowed(region.mask, node_values(captured), (6, H, 4, 4)), truth)


def written_through_a_slice():
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[:, :4] = True
    return mask


def read_before_a_write(seen):
    before = seen + 0
    keep = before[:, None, None, :] != 0
    before.zero_()
    return keep.expand(B, 1, N, N)


def depends_on_positions_and_values(seen):
    return (seen * torch.arange(N))[:, None, None, :].expand(B, 1, N, N) > 5


def rounded_positions():
    q, k = (x.to(torch.bfloat16) * 33 for x in positions())
    return k <= q - 33


def differences_that_wrap_around():
    q, k = (x.to(torch.uint8) for x in positions())
    return q - k < 4


def flags_that_wrap_around(seen):
    return ((seen.to(torch.uint8) - 1).float() * -1e4)[:, None, None, :].expand(B, 1, N, N)


WITHOUT_INPUTS = [written_through_a_slice, rounded_positions, differences_that_wrap_around]
WITH_PADDING = [read_before_a_write, depends_on_positions_and_values, flags_that_wrap_around]


@pytest.mark.parametrize("build", [*WITHOUT_INPUTS, *WITH_PADDING], ids=lambda f: f.__name__)
def test_what_cannot_be_read_is_still_right(build):
    given = inputs() if build in WITHOUT_INPUTS else inputs(seen=padding())
    region, values, built = read(build, given)
    mask = region.mask
    assert mask.tensors or mask.boolean is not None
    agrees(mask, values, built)


def test_a_cat_is_not_read_past_its_parts():
    def build(seen):
        whole = torch.cat([torch.ones(B, 4, dtype=torch.int64), seen], 1)
        return (whole[:, None, None, :] != 0).expand(B, 1, N, M)

    region, values, built = read(build, inputs(M, seen=padding()))
    assert region.mask.predicate == "t0[b, k] != 0" and "cat" in region.mask.tensors[0].name
    agrees(region.mask, values, built, N, M)


@pytest.mark.parametrize(
    ("build", "seeing"),
    [
        (lambda q, k, t: k <= q, True),
        (lambda q, k, t: k < q, False),
        (lambda q, k, t: (k <= q) & (q - k < 3), True),
        (lambda q, k, t: (k <= q) & (t[:, None, :, None] == t[:, None, None, :]), True),  # packed sequences
        (lambda q, k, t: (k <= q) | (t != 0)[:, None, None, :], True),
        (lambda q, k, t: (k <= q) & (t != 0)[:, None, None, :], False),
        (lambda q, k, t: (t != 0)[:, None, None, :], False),
        (lambda q, k, t: torch.where(k <= q, 0.0, MIN), True),
        (lambda q, k, t: torch.where(t[:, None, None, :] != 0, 0.0, MIN), False),
    ],
)
def test_whether_every_query_sees_a_key(build: Callable[..., Tensor], seeing: bool) -> None:
    region, values, built = read(lambda t: build(*positions(), t), inputs(t=padding()))
    assert region.mask.seeing is seeing
    agrees(region.mask, values, built)


def test_with_more_keys_than_queries_every_query_sees_a_key() -> None:
    region, _, _ = read(lambda: torch.arange(M)[None, :] <= torch.arange(N)[:, None] + M - N, inputs(M))
    assert region.mask.seeing and region.mask.causal
    region, _, _ = read(lambda: torch.arange(M)[None, :] > torch.arange(N)[:, None] + M - N, inputs(M))
    assert not region.mask.seeing
