"""Fixed costs and dtypes on a GPU, whose constants are a plausible H100's: chosen by hand, measured on no device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sptc.device.costs import DeviceCosts, Rates
from sptc.ir.region import AttentionSettings, FfnSettings, UnitSettings
from sptc.passes.decide.cost import (
    AttentionShape,
    FfnShape,
    LossShape,
    dense_attention,
    dense_ffn,
    dense_loss,
    ffn_over_units,
    loss_by_rows,
    sparse_attention,
    sparse_ffn,
)

PLAUSIBLE_GPU = DeviceCosts(
    single=Rates(gemm=5e13, attention=4e13, attention_backward=3e13),
    half=Rates(gemm=6.5e14, attention=4e14, attention_backward=3e14),
    bandwidth=2.5e12,
    exponentials=5e11,
    sparse_attention=2.5e14,
    sparse_attention_backward=1.5e14,
    pooled=1e14,
    coded=3e13,
    op_seconds=8e-6,
    attention_seconds=6e-4,
    default_blocks=lambda n, m, density, own: (128, 64),
    gpu=True,
)
CPU = replace(PLAUSIBLE_GPU, gpu=False)
SETTINGS = AttentionSettings(0.125, 128, 64, "pooled")
EMPTY = {}  # no symbols


def attention(b: int, n: int, dtype: torch.dtype = torch.bfloat16) -> AttentionShape:
    """A LLaMA-8B-shaped layer."""
    return AttentionShape(b, 32, 8, n, n, 128, 128, dtype, fused=True, halved=True, own=True, need=(True, True, True))


def ffn(tokens: int) -> FfnShape:
    """A LLaMA-8B-shaped layer with a LoRA adapter on every projection."""
    sizes = {"d": 4096, "hidden": 14336, "d_out": 4096, "ups": 2, "up_ranks": 32, "down_rank": 16}
    needs = {"need_x": True, "need_ups": 0, "need_down": False, "need_adapters": True}
    return FfnShape(tokens=tokens, **sizes, dtype=torch.bfloat16, stand_in_rank=0, trained_router=False, **needs)


def seconds(work) -> float:
    return work.at(EMPTY).seconds


def attention_seconds(device: DeviceCosts, b: int, n: int, dtype: torch.dtype = torch.bfloat16) -> float:
    return seconds(sparse_attention(attention(b, n, dtype), SETTINGS, device))


def fixed(device: DeviceCosts, b: int) -> float:
    """Seconds of sparse attention that remain when its length is nothing beside them."""
    return attention_seconds(device, b, 1) - attention_seconds(replace(device, attention_seconds=0.0), b, 1)


@pytest.mark.parametrize("b", [1, 8, 64])
def test_a_gpu_pays_for_its_launches_once_and_a_cpu_for_each_row(b):
    assert fixed(PLAUSIBLE_GPU, b) == pytest.approx(PLAUSIBLE_GPU.attention_seconds)
    assert fixed(CPU, b) == pytest.approx(b * CPU.attention_seconds)


def test_a_row_of_attention_takes_more_than_its_products():
    """The fused kernel's time for each query counts as much in short sequences as in long ones; forward alone has a third of it."""
    slow = replace(CPU, half=replace(CPU.half, row_seconds=1e-6))
    for n in (128, 2048):
        short = attention(2, n, torch.bfloat16)
        for shape, part in ((short, 1.0), (replace(short, need=(False, False, False)), 1 / 3)):
            more = seconds(dense_attention(shape, slow)) - seconds(dense_attention(shape, replace(slow, half=CPU.half)))
            assert more == pytest.approx(shape.b * shape.h * n * 1e-6 * part)


def test_causal_tiles_at_the_start_have_fewer_keys():
    """At density 1 a tile looks at the keys up to its end: half of all pairs, and half a tile."""
    settings = replace(SETTINGS, density=1.0)
    whole, causal = (sparse_attention(replace(attention(1, 1024), own=own), settings, CPU).at(EMPTY).flops for own in (False, True))
    choosing = whole - attention(1, 1024).h * 1024 * 1024 * 14 * 128  # seven products with heads of 128, forward and backward
    assert (causal - choosing) / (whole - choosing) == pytest.approx(0.5 + settings.query_block / 2048)


def test_a_gpu_multiplies_all_blocks_in_one_call_and_a_cpu_one_after_the_other():
    def spent(device: DeviceCosts, blocks: int) -> float:
        free = replace(device, op_seconds=0.0)
        return sum(sign * seconds(sparse_ffn(ffn(64), FfnSettings(blocks, blocks // 2), d)) for sign, d in ((1, device), (-1, free)))

    assert spent(PLAUSIBLE_GPU, 64) == pytest.approx(spent(PLAUSIBLE_GPU, 8))
    assert 4 * spent(CPU, 8) < spent(CPU, 64) < 8 * spent(CPU, 8)


@pytest.mark.parametrize("b, n", [(1, 8192), (4, 4096), (8, 2048), (16, 2048)])
def test_attention_pays_on_a_gpu_whatever_the_batch(b, n):
    assert attention_seconds(PLAUSIBLE_GPU, b, n) < seconds(dense_attention(attention(b, n), PLAUSIBLE_GPU))


def test_an_ffn_of_many_blocks_pays_on_a_gpu():
    assert seconds(sparse_ffn(ffn(8192), FfnSettings(16, 8), PLAUSIBLE_GPU)) < seconds(dense_ffn(ffn(8192), PLAUSIBLE_GPU))


def test_what_is_too_small_for_its_launches_stays_dense():
    for b, n in ((1, 256), (8, 128)):
        assert attention_seconds(PLAUSIBLE_GPU, b, n) > seconds(dense_attention(attention(b, n), PLAUSIBLE_GPU))


def test_fp32_on_a_gpu_is_judged_at_its_own_speed():
    """Sparse rates are measured in bf16: fp32 must not be compared with them, or it would seem to pay tenfold."""
    half, single = (seconds(dense_attention(attention(1, 8192, t), PLAUSIBLE_GPU)) for t in (torch.bfloat16, torch.float32))
    sparse_half, sparse_single = (attention_seconds(PLAUSIBLE_GPU, 1, 8192, t) for t in (torch.bfloat16, torch.float32))
    assert sparse_single / sparse_half > 0.5 * single / half
    assert attention_seconds(CPU, 1, 8192, torch.float32) == attention_seconds(CPU, 1, 8192), "a CPU computes both alike"
    faster = replace(CPU, bf16_gain=2.0, bf16_gain_backward=2.0)
    half, single, other = (attention_seconds(faster, 1, 8192, t) for t in (torch.bfloat16, torch.float32, torch.float16))
    assert 0.5 * single < half < 0.9 * single and other == single, "unless it multiplies bf16; fp16 is widened"


def kept(work) -> float:
    return work.at(EMPTY).kept


def test_bytes_kept_for_backward():
    """Of bf16 elements, by hand: what fused attention, an FFN and a loss keep, and what is left of it."""
    tokens = 2 * 512
    by_hand = 2 * tokens * 128 * (32 + 32 + 8 + 8)  # queries and output of 32 heads, keys and values of 8
    assert kept(dense_attention(attention(2, 512), CPU)) == kept(sparse_attention(attention(2, 512), SETTINGS, CPU)) == by_hand
    spelled = replace(attention(2, 512), fused=False, halved=False)
    assert kept(dense_attention(spelled, CPU)) == by_hand + 2 * 2 * 32 * 512 * 512
    assert kept(dense_ffn(ffn(tokens), CPU)) == 2 * tokens * (4096 + 2 * 14336)
    assert kept(ffn_over_units(ffn(tokens), UnitSettings(14336, 14336 // 2), CPU)) == 2 * tokens * (4096 + 14336)
    loss = LossShape(tokens, 0.25, 4096, 128256, rank=0, dtype=torch.bfloat16, need_x=True, need_weight=False, need_adapter=False)
    assert kept(dense_loss(loss, CPU)) == 2 * tokens * (128256 + 4096)
    assert kept(loss_by_rows(loss, CPU)) == 2 * tokens * 4096
    assert kept(loss_by_rows(replace(loss, need_weight=True), CPU)) == 2 * 4096 * (tokens + 128256)


def test_labels_that_do_not_count_cost_a_loss_nothing():
    loss = LossShape(4096, 1.0, 4096, 128256, rank=16, dtype=torch.bfloat16, need_x=True, need_weight=False, need_adapter=True)
    whole, quarter = (loss_by_rows(replace(loss, counted=share), CPU).at(EMPTY) for share in (1.0, 0.25))
    assert quarter.flops == whole.flops / 4 and quarter.seconds == whole.seconds / 4
    assert whole.flops == dense_loss(loss, CPU).at(EMPTY).flops
