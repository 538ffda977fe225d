"""Dynamic negatives: the hardest of n, the softmax of the scores, and what a temperature of 0 is the limit of."""

import numpy as np
import pytest
import torch

from recsys.contracts import FIRST_ID, Items
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_dns import DynamicNegatives

ITEMS = Items(FIRST_ID + np.arange(4), np.array([8, 4, 2, 1]), np.array([1, 1, 0, 0]))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"candidates": 1, "power": 0.75}])
def test_contract(options):
    contract("sampler", DynamicNegatives, **options)


def test_the_hardest_of_the_candidates_is_taken():
    scores = torch.randn(50, 2, 6, generator=torch.Generator().manual_seed(0))
    chosen = DynamicNegatives(ITEMS).choose(scores, torch.zeros(50, 2, 6))
    for n in range(50):
        for k in range(2):
            best = max(range(6), key=lambda c: float(scores[n, k, c]))
            assert int(chosen[n, k]) == best


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_draws_from_the_softmax(temperature):
    rows = 40_000
    scores = torch.tensor([0.3, -1.0, 1.2, 0.0]).expand(rows, 1, 4)
    uniform = torch.rand(rows, 1, 4, generator=torch.Generator().manual_seed(1))
    chosen = DynamicNegatives(ITEMS, candidates=4, temperature=temperature).choose(scores, uniform)
    found = torch.bincount(chosen.flatten(), minlength=4) / rows
    wanted = (scores[0, 0] / temperature).softmax(0)
    assert float(((found - wanted).abs() / (wanted * (1 - wanted) / rows).sqrt()).max()) < 4.5


def test_the_ends_of_the_uniform_numbers_stay_finite():
    uniform = torch.tensor([0.0, 1.0, 0.5]).expand(1, 1, 3)
    chosen = DynamicNegatives(ITEMS, candidates=3, temperature=1.0).choose(torch.zeros(1, 1, 3), uniform)
    assert int(chosen) == 1


@pytest.mark.parametrize("options", [{"candidates": 0}, {"temperature": -1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        DynamicNegatives(ITEMS, **options)
