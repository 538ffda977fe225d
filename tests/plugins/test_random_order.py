"""The control: any order of fields is as likely as any other, and follows from the seed alone."""

import itertools
import math
from collections import Counter

from rankings import INFORMATIVE, NOISE, above, make_rows, make_run

from recsys.api import Fields
from recsys.testing import contract
from recsys_random_order import random_order


def order(names, seed):
    ranking = random_order(Fields(names, (2,) * len(names), 4)).rank(make_run(make_rows(1), seed=seed))
    assert ranking.passes == 0
    assert sorted(ranking.scores.values()) == [(i + 1) / len(names) for i in range(len(names))]
    return ranking.scores


def test_contract():
    contract("selector", random_order)


def test_every_order_is_as_likely():
    found = Counter("".join(sorted("abc", key=order(("a", "b", "c"), seed).get)) for seed in range(1200))
    assert set(found) == set(map("".join, itertools.permutations("abc")))
    assert max(abs(count - 200) for count in found.values()) < 5 * math.sqrt(200 * 5 / 6)


def test_useless_fields_stand_above_informative_ones_half_of_the_time():
    values = [above(order(INFORMATIVE + NOISE, seed)) for seed in range(200)]
    assert abs(sum(values) / 200 - 0.5) < 0.05  # one order alone is about 0.16 off


def test_the_seed_decides():
    names = tuple("abcdefgh")
    assert order(names, 1) == order(names, 1) != order(names, 2)
