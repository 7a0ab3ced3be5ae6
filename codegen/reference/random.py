"""Dropout masks from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the same on every device.

The fate of element `index` is a function of the seed and the index alone: word `index % 4` of Philox(counter = index // 4, key = seed).
So a sparse op that visits some elements in any order drops exactly those that a dense op would drop.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 15  # counters at a time: ten rounds over a few 256 KiB buffers stay in the cache


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on unsigned 32-bit words held in int64 tensors of one shape; the keys are 0-d. Inputs are not changed."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The low 64 bits of the product are right in two's complement; shift and mask make them unsigned words.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_LOW), p0.bitwise_and_(_LOW)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, index: Tensor, p: float) -> Tensor:
    """Which elements survive dropout with probability `p` of being dropped.

    Args:
        seed: int64, one element.
        index: int64, any shape, each >= 0: the logical index of an element.
        p: in [0, 1].

    Returns:
        bool of the shape of `index`: True with probability 1 - p.
    """
    threshold = drop_threshold(p)
    flat = index.reshape(-1)
    keep = torch.empty(flat.shape, dtype=torch.bool, device=index.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        words = torch.stack(_words(seed, part >> 2))
        keep[start : start + _CHUNK] = words.gather(0, (part & 3).unsqueeze(0)).squeeze(0) >= threshold
    return keep.view(index.shape)


def drop_threshold(p: float) -> int:
    """The least 32-bit word that survives dropout with probability `p`: 2**32, which none reaches, for p = 1."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be in [0, 1], got {p}")
    return round(p * 2.0**32)


def _words(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seed = seed.reshape(())
    key = (seed & _LOW, (seed >> 32) & _LOW)
    zero = torch.zeros_like(counter)
    return philox4x32((counter & _LOW, (counter >> 32) & _LOW, zero, zero), key)
