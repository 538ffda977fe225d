"""Sets of rows as bits: which are there, and how many before each of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WORD = 64
_PAIRS, _FOURS, _BYTES, _ONES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101


def pack_words(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Words of 64 bits, the first the lowest, and how many are set before each: `[n] bool -> [⌈n/64⌉]` int64, both.

    Jacobson, "Space-efficient Static Trees and Graphs", FOCS 1989.
    """
    words = -(-len(rows) // WORD)
    bits = np.zeros(words * WORD, bool)
    bits[: len(rows)] = rows.detach().cpu().numpy()
    packed = torch.from_numpy(np.packbits(bits, bitorder="little").view("<i8").astype(np.int64))
    sums = torch.from_numpy(bits).view(words, WORD).sum(1)
    return packed, sums.cumsum(0) - sums


def count_below(word: Tensor, bit: Tensor) -> Tensor:
    """How many bits of each word stand before a bit in [0, 64), `[…], […] -> […]` int64."""
    return count_bits(word & ((torch.ones_like(bit) << bit) - 1))


def count_bits(x: Tensor) -> Tensor:
    """Number of ones in each int64. The shifts are arithmetic; what they bring in from the left is masked away."""
    x = x - ((x >> 1) & _PAIRS)
    x = (x & _FOURS) + ((x >> 2) & _FOURS)
    x = (x + (x >> 4)) & _BYTES
    return ((x * _ONES) >> 56) & 0xFF
