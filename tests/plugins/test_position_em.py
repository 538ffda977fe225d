"""The chance of a look from clicks, against planted slates, a loop over rows, and a search that never goes down."""

import math

import numpy as np
import pytest
import torch
from slates import LOOK, SCHEMA, SHOWN, draw, naive

from recsys.contracts import Batch
from recsys.errors import DataError, RecipeError
from recsys.testing import contract
from recsys_position_em import PositionEM, PositionRandomised


def fitted(batches, **options):
    model = PositionEM(SCHEMA, items=("item",), positions=SHOWN, **options)
    model.fit(batches)
    return model


def test_planted_chances_are_found_where_the_rate_of_clicks_is_far_off():
    slates = draw(120_000)
    assert np.abs(naive(slates) - LOOK)[1:].max() > 0.05  # or nothing would be shown by this test
    theta = fitted([slates.batch(slice(i, i + 20_000)) for i in range(0, 120_000, 20_000)]).theta.numpy()
    assert np.abs(theta - LOOK).max() < 0.015
    assert np.abs(theta - LOOK).max() < np.abs(naive(slates) - LOOK).max() / 4


def test_randomised_rows_tell_it_too_and_the_others_are_not_read():
    random, chosen = draw(150_000, seed=5, temperature=0.0), draw(20_000)
    model = PositionRandomised(SCHEMA, positions=SHOWN)
    model.fit([chosen.batch(), random.batch(uniform=1)])
    assert np.abs(model.theta.numpy() - LOOK).max() < 0.015
    rows = random.click.double().mean(0).numpy()
    np.testing.assert_allclose(model.theta.numpy(), rows / rows.max(), rtol=1e-6)


def test_the_likelihood_never_falls_and_the_steps_are_those_of_a_loop_over_rows():
    slates = draw(150, seed=1)
    batch = slates.batch()
    model = fitted([batch], iterations=25, tolerance=0.0)
    gains = np.diff(model.likelihoods)
    assert len(gains) == 24
    assert (gains >= -1e-12).all()
    rows = list(
        zip(batch.ids[:, 0].tolist(), batch.context["position"].tolist(), batch.label["label"].tolist(), strict=True)
    )
    theta = {k: 0.9 for k in range(SHOWN)}
    shown = {i: [c for j, _, c in rows if j == i] for i, _, _ in rows}
    gamma = {i: min(max(sum(c) / len(c) / 0.9, 1e-9), 1 - 1e-9) for i, c in shown.items()}
    for step in range(25):
        seen, liked, total = {k: [] for k in theta}, {i: [] for i in gamma}, 0.0
        for i, k, c in rows:
            t, g = theta[k], gamma[i]
            total += math.log(t * g) if c else math.log(1 - t * g)
            seen[k].append(1.0 if c else t * (1 - g) / (1 - t * g))
            liked[i].append(1.0 if c else g * (1 - t) / (1 - t * g))
        assert model.likelihoods[step] == pytest.approx(total / len(rows), rel=1e-9)
        theta = {k: sum(v) / len(v) for k, v in seen.items()}
        gamma = {i: sum(v) / len(v) for i, v in liked.items()}
    most = max(theta.values())
    assert model.theta.tolist() == pytest.approx([theta[k] / most for k in range(SHOWN)], rel=1e-5)


def test_where_all_is_looked_at_every_chance_is_the_same():
    slates = draw(60_000, look=np.ones(SHOWN))
    assert np.abs(naive(slates) - 1).max() > 0.05
    assert fitted([slates.batch()]).theta.min().item() > 0.97


def test_positions_are_counted_from_the_first_and_those_without_rows_take_over_a_neighbours():
    slates = draw(3000)
    batch = slates.batch()
    moved = Batch(batch.ids, label=batch.label, context={**batch.context, "position": batch.context["position"] + 1})
    one = fitted([batch])
    assert torch.equal(fitted([moved], first=1).theta, one.theta)
    wide = PositionEM(SCHEMA, items=("item",), positions=SHOWN + 3)
    wide.fit([batch])
    assert wide.theta[:SHOWN].tolist() == pytest.approx(one.theta.tolist())
    assert wide.theta[SHOWN:].tolist() == [wide.theta[SHOWN - 1].item()] * 3
    far = Batch(batch.ids[:1], context={"position": torch.tensor([99])})
    assert one.estimate(far).tolist() == [one.theta[-1].item()]


def test_what_cannot_be_told_is_said():
    with pytest.raises(RecipeError, match="no field is called 'film'; fields: item"):
        PositionEM(SCHEMA, items=("film",))
    with pytest.raises(RecipeError, match="no task 'buy'; tasks: label"):
        PositionRandomised(SCHEMA, task="buy")
    batch = draw(10).batch()
    without = Batch(batch.ids, label=batch.label, context={"group": batch.context["group"]})
    with pytest.raises(RecipeError, match="needs the context column 'position'"):
        fitted([without])
    none = Batch(batch.ids, label={"label": torch.zeros(len(batch))}, context=batch.context)
    with pytest.raises(DataError, match="no row has a click"):
        fitted([none])
    with pytest.raises(DataError, match="0 rows are `uniform`"):
        PositionRandomised(SCHEMA, positions=SHOWN).fit([batch])
    with pytest.raises(DataError, match="not been fitted"):
        PositionEM(SCHEMA, items=("item",)).estimate(batch)


def test_contract():
    contract("propensity", PositionEM, items=("f0",))
    contract("propensity", PositionRandomised)
