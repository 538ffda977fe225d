"""What debiasing gains on worlds whose truth is known, beside the same model without it: several worlds each."""

import pytest
from flips import study as flipped
from popular import gain
from popular import study as exposed


@pytest.mark.slow
def test_pd_ranks_better_where_exposure_followed_popularity():
    found = exposed(range(1, 6), 600, names=("bpr", "pd"))
    mean, error = gain(found, "pd")
    assert mean > 3 * error


@pytest.mark.slow
def test_nbpo_costs_little_where_nothing_was_flipped():
    mean, _ = flipped(0.0, 3, 500, ("bpo", "nbpo")).gain("nbpo")
    assert abs(mean) < 0.005
