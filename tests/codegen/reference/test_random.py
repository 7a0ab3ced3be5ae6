"""Philox: the published known answers, and that a mask depends on seed and index only."""

import pytest
import torch

from sptc.codegen.reference.random import keep_mask, philox4x32

KNOWN = [  # counter, key, answer: kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == answer


def test_element_uses_word_of_its_counter():
    seed = torch.tensor(-(2**40) - 12345)
    index = torch.tensor([0, 5, 2**40 + 3, 7])
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for p in (0.1, 0.5, 0.9):
        for i, kept in zip(index, keep_mask(seed, index, p), strict=True):
            c, zero = i // 4, torch.zeros((), dtype=torch.int64)
            word = philox4x32((c & 0xFFFFFFFF, c >> 32, zero, zero), key)[int(i % 4)]
            assert bool(kept) == (int(word) >= p * 2**32)


def test_rate_bounds_and_seed():
    index = torch.arange(200_000)
    a, b = (keep_mask(torch.tensor(s), index, 0.25) for s in (1, 2))
    assert abs(a.double().mean() - 0.75) < 0.005
    assert abs((a == b).double().mean() - (0.75**2 + 0.25**2)) < 0.005
    assert keep_mask(torch.tensor(1), index, 0.0).all()
    assert not keep_mask(torch.tensor(1), index, 1.0).any()
    with pytest.raises(ValueError, match="dropout probability"):
        keep_mask(torch.tensor(1), index, 1.5)
