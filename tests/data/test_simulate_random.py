"""The counter-based random numbers: exact values, and the same values however they are asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.simulate_random import _SINE, Draws, Region, Stream, key, scale

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15


def slow_uniform(seed, stream, index):
    """The definition in Python integers, one number at a time."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        return z ^ (z >> 31)

    k = mix(mix((seed + GOLDEN) % WORD) ^ ((stream * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % WORD))
    return ((mix((k + (index + 1) * GOLDEN) % WORD) >> 11) + 0.5) * 2.0**-53


def test_golden_values():
    """S1: catches any change of a constant, a shift or the order of mixing: every log would change with it."""
    assert key(7, 3) == 0xF5B30EF4359B5CF3
    expected = [0.5219194394159739, 0.12092678750667102, 0.07215014254818214, 0.9356843461797788]
    assert Draws.span(7, 0, 4).uniform(3).tolist() == expected
    assert Draws.span(7, 10**8 - 1, 10**8).uniform(3).tolist() == [0.6946272984660706]
    assert Draws.span(0, 0, 1).uniform(0).tolist() == [0.4310423761097019]


@given(
    seed=st.integers(0, 2**63),
    stream=st.integers(0, 2**21),
    index=st.lists(st.integers(0, 2**43), min_size=1, max_size=20),
)
def test_vectors_equal_the_definition(seed, stream, index):
    """Catches wrap-around done wrong in numpy, and a scratch buffer that leaks from one draw into the next."""
    draws = Draws(seed, np.asarray(index, dtype=np.int64))
    draws.uniform(stream + 1)
    assert draws.uniform(stream).tolist() == [slow_uniform(seed, stream, i) for i in index]


def test_uniform_and_normal_have_the_right_distribution():
    """Catches a mixer that is deterministic but not random, and a normal from two dependent streams."""
    draws = Draws.span(11, 0, 400_000)
    u = draws.uniform(5)
    chi2 = ((np.bincount(scale(u, 256), minlength=256) - len(u) / 256) ** 2 / (len(u) / 256)).sum()
    assert abs(chi2 - 255) < 4 * np.sqrt(2 * 255)
    z = draws.normal(5)
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / len(z))
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / len(z))
    others = [draws.uniform(6), Draws.span(12, 0, 400_000).uniform(5), np.roll(u, 1), draws.uniform(5 + _SINE)]
    for other in others:
        assert abs(np.corrcoef(u, other)[0, 1]) < 4 / np.sqrt(len(u))


def test_streams_and_regions_never_meet():
    """Catches two purposes that share a number: their draws would be equal, not merely correlated."""
    ranges = [range(Stream.FIELD_EFFECT, 190), range(Stream.FIELD_VALUE, 380), range(Stream.PAIR_EFFECT, 600)]
    single = [s for s in Stream if s not in (Stream.FIELD_EFFECT, Stream.FIELD_VALUE, Stream.PAIR_EFFECT)]
    taken = [n for r in ranges for n in r] + [int(s) for s in single]
    assert len(set(taken)) == len(taken)
    assert max(taken) < _SINE
    assert Region.UNIFORM - Region.PILOT > 2**39 < Region.PILOT - Region.LOG


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_scale_stays_below_the_count(count):
    """Catches the rounding of u·count up to count, an id that no table has."""
    assert scale(np.asarray([2.0**-54, 1 - 2.0**-53, 1.0]), count).tolist() == [0, count - 1, count - 1]
