"""A device on which sparse pays in the tiny models of the tests, so that there is something to plan."""

from __future__ import annotations

from sptc.device.costs import DeviceCosts, Rates

_RATES = Rates(gemm=1e9, attention=1e9, attention_backward=1e9)
DEVICE = DeviceCosts(
    single=_RATES,
    half=_RATES,
    bandwidth=1e12,
    exponentials=1e12,
    sparse_attention=1e10,
    sparse_attention_backward=1e10,
    pooled=1e12,
    coded=1e12,
    op_seconds=0.0,
    attention_seconds=0.0,
    default_blocks=lambda n, m, density, own: (4, 2),
)
