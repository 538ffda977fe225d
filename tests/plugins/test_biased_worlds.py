"""What debiasing gains on worlds whose truth is known, beside the same model without it: several worlds each."""

import pytest
from flips import study as flipped
from pooling import study as pooled
from popular import NAIVE, gain
from popular import study as exposed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("pd", 600), ("macr", 2000)])
def test_popularity_is_left_out_where_exposure_followed_it(name, steps):
    found = exposed(range(1, 6), steps, names=(NAIVE[name], name))
    mean, error = gain(found, name)
    assert mean > 3 * error


@pytest.mark.slow
def test_nbpo_costs_little_where_nothing_was_flipped():
    mean, _ = flipped(0.0, 3, 500, ("bpo", "nbpo")).gain("nbpo")
    assert abs(mean) < 0.005


@pytest.mark.slow
def test_the_weights_of_cet_tell_what_was_not_judged_where_judging_goes_by_a_threshold():
    """They rise with what is likely to be judged: no help where judging was chance, and little cost at τ = 10."""
    steep, chance = pooled(8.0, 3, 300), pooled(0.0, 3, 300)
    assert min(steep.weights) > 0.6
    assert max(chance.weights) < 0.5
    for found, least in ((steep, -0.003), (chance, -0.008)):
        mean, error = found.gain()
        assert least < mean < 3 * error
