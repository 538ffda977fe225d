"""Random numbers as a function: u(seed, stream, index), with no state.

Any row can be drawn alone, so chunk size, number of processes and order of work cannot change a value. The
mixer is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) applied to a Weyl sequence per stream:

    key(seed, s) = mix(mix(seed + G) ^ (s·0xD1B54A32D192ED03 + 0x632BE59BD9B4E019))
    u(seed, s, i) = ((mix(key + (i + 1)·G) >> 11) + 0.5)·2⁻⁵³,   G = 0x9E3779B97F4A7C15
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]
Longs = npt.NDArray[np.int64]

CHUNK = 65_536
"""Rows that are drawn at once; at this size the working arrays stay in cache."""

FIELDS = 180
"""Most fields that the stream numbers leave room for."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1
_SINE = 1 << 20


class Stream(IntEnum):
    """What a random number is for. A number once given is never used for something else."""

    USER_ATTRIBUTE = 1
    USER_LATENT = 2
    ITEM_LATENT_A = 3
    ITEM_LATENT_B = 4
    ITEM_SPEED = 5
    POPULARITY_RANK = 6
    USER_SEGMENT = 7
    POPULARITY_PHASE = 8
    USER_BIAS = 9
    FIELD_EFFECT = 10  # + field, up to 189
    ITEM_BIAS = 190
    POPULARITY_JUMP = 191
    CONFOUNDER = 192
    FLIP_USER = 193
    FLIP_ITEM = 194
    ATTRIBUTE_KNOWN = 195
    FIELD_VALUE = 200  # + field, up to 379
    PAIR_EFFECT = 400  # + 2·pair for the left field, + 2·pair + 1 for the right one
    EXPOSURE = 600
    RELEVANCE = 601
    FLIP_PLUS = 602  # a click that is recorded as none
    FLIP_MINUS = 603
    CONVERSION = 604
    DELAY = 605
    SELECT = 606
    EXAMINE = 607
    GUMBEL = 608
    CANDIDATE = 609
    USER = 610
    ITEM = 611
    OLD_SCORE = 613
    RANDOMISED = 614
    CONVERSION_EFFECT = 800  # + field, up to 979
    VALUE = 1000  # + field, up to 1179; of a field that is drawn again to tell what it is worth


class Region(IntEnum):
    """Offset of the row index, so that calibration and the uniform slice never share a draw with the log."""

    LOG = 0
    PILOT = 1 << 40
    UNIFORM = 1 << 41


def _mix(z: Words, scratch: Words) -> Words:
    """Scramble 64-bit words in place."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        np.right_shift(z, np.uint64(shift), out=scratch)
        np.bitwise_xor(z, scratch, out=z)
        np.multiply(z, factor, out=z)
    np.right_shift(z, np.uint64(31), out=scratch)
    return np.bitwise_xor(z, scratch, out=z)


def _mix_word(z: int) -> int:
    z = ((z ^ (z >> 30)) * int(_MIX_1)) & _WORD
    z = ((z ^ (z >> 27)) * int(_MIX_2)) & _WORD
    return z ^ (z >> 31)


def key(seed: int, stream: int) -> int:
    """Return the 64-bit key of a stream of a seed."""
    salt = (stream * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _WORD
    return _mix_word(_mix_word((seed + _GOLDEN) & _WORD) ^ salt)


class Draws:
    """The random numbers of a set of indices, any stream.

    Args:
        seed: of the world.
        index: `[n]` row or entity indices, not negative.
    """

    def __init__(self, seed: int, index: Longs) -> None:
        self._seed = seed
        self._index = index
        # (i + 1)·G is the same for every stream: it is worked out once per chunk, not once per column.
        self._weyl = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        self._scratch = np.empty_like(self._weyl)

    @classmethod
    def span(cls, seed: int, start: int, stop: int) -> Draws:
        """Return the draws of the indices `start … stop-1`."""
        return cls(seed, np.arange(start, stop, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._index)

    def uniform(self, stream: int) -> Floats:
        """Return `[n]` float64 in (0, 1)."""
        z = _mix(self._weyl + np.uint64(key(self._seed, stream)), self._scratch)
        u = (z >> np.uint64(11)).astype(np.float64)
        u += 0.5
        u *= 2.0**-53
        return u

    def normal(self, stream: int) -> Floats:
        """Return `[n]` standard normal float64: the cosine branch of Box and Muller, from two streams."""
        radius = np.sqrt(-2.0 * np.log(self.uniform(stream)))
        return np.asarray(radius * np.cos(2.0 * np.pi * self.uniform(stream + _SINE)))

    def below(self, stream: int, count: int) -> Longs:
        """Return `[n]` integers, uniform on `0 … count-1`."""
        return scale(self.uniform(stream), count)


def scale(u: Floats, count: int) -> Longs:
    """Turn `u` in (0, 1) into integers on `0 … count-1`; the product can round up to `count`, hence the cut."""
    return np.minimum((u * count).astype(np.int64), count - 1)
