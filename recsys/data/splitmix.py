"""The mixer behind every hash that outlives a process: splitmix64, of one number and of arrays; needs NumPy alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB


def mix(x: int) -> int:
    """Return splitmix64 of one integer; the scalar twin of `mix_array`."""
    z = (x + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * _MUL1) & _MASK
    z = ((z ^ (z >> 27)) * _MUL2) & _MASK
    return z ^ (z >> 31)


def mix_array(x: npt.NDArray[np.integer]) -> U64:
    """Return splitmix64 of every element, `[...] -> [...]` uint64; negative integers count modulo 2^64."""
    z = x.astype(np.uint64) + np.uint64(_GAMMA)
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MUL1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MUL2)
    z ^= z >> np.uint64(31)
    return z


def hash_text(text: str) -> int:
    """Return the hash of one text, as `recsys.data.hashing` describes it."""
    raw = text.encode()
    words = range(0, len(raw), 8)
    total = sum(mix(int.from_bytes(raw[at : at + 8], "little") ^ mix(i)) for i, at in enumerate(words))
    return mix((len(raw) + total) & _MASK)
