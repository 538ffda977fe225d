"""Doubly robust losses: right if either part is, what each part learns from, and fakes that fail."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from debias_world import DIM, ITEMS, USERS, ids, world, z_score
from hypothesis import given
from hypothesis import strategies as st

from recsys.abilities import Summing
from recsys.api import Batch, EncodedSchema, Field, RecipeError
from recsys.testing import contract
from recsys_dr import DoublyRobust, Imputer, doubly_robust

SMALL = EncodedSchema((Field("user", 6), Field("item", 5), Field("price", 2, numeric=True)), (), ("y",))
PAIRS = EncodedSchema((Field("user", USERS + 2), Field("item", ITEMS + 2)), (), ("y",))


def small(rows: int = 9, seed: int = 0) -> tuple[torch.Tensor, Batch]:
    """Logits and rows in float64, a third of them observed at least."""
    random = torch.Generator().manual_seed(seed)
    draw = torch.rand(rows, 4, generator=random, dtype=torch.float64)
    batch = Batch(
        torch.stack([(draw[:, 0] * 6).long(), (draw[:, 1] * 5).long(), torch.ones(rows, dtype=torch.int64)], 1),
        torch.cat([torch.ones(rows, 2), draw[:, 2:3].float()], 1),
        label={"y": (draw[:, 2] > 0.5).double()},
        context={"propensity": 0.02 + 0.9 * draw[:, 3], "observed": (torch.arange(rows) % 3 != 1).long()},
    )
    return 3 * torch.randn(rows, generator=random, dtype=torch.float64), batch


def loss(**options: object) -> DoublyRobust:
    torch.manual_seed(4)
    made = DoublyRobust(("y",), SMALL, dim=3, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        made.imputer.first.normal_()
        made.imputer.bias.fill_(0.3)
    return made


def imputed(made: DoublyRobust, batch: Batch) -> list[float]:
    """The imputation model, with loops."""
    model, found = made.imputer, []
    for b in range(len(batch)):
        rows = [int(batch.ids[b, f]) + int(model.offsets[f]) for f in range(3)]
        x = [float(batch.values[b, f]) for f in range(3)]  # type: ignore[index]
        g = float(model.bias[0]) + sum(float(model.first[r, 0]) * v for r, v in zip(rows, x, strict=True))
        for i in range(3):
            for j in range(i):
                g += x[i] * x[j] * float(model.vectors[rows[i], 0] @ model.vectors[rows[j], 0])  # type: ignore[index]
        found.append(1 / (1 + math.exp(-g)))
    return found


def test_contract() -> None:
    contract("loss", DoublyRobust)
    contract("loss", DoublyRobust, mode="mrdr", dim=0)
    contract("loss", DoublyRobust, imputation="label", fields=["f1"])


def by_hand(z: torch.Tensor, batch: Batch, r: list[float], floor: float, mode: str, label: bool) -> tuple[float, float]:
    """The loss and what the imputation model learns from, row by row."""
    value = lesson = 0.0
    for b in range(len(z)):
        x, y, o = float(z[b]), float(batch.label["y"][b]), int(batch.context["observed"][b])
        theta = max(float(batch.context["propensity"][b]), floor)
        soft = r[b] + o / theta * (y - r[b])
        bounded = min(x, 15.0) if soft > 1 else max(x, -15.0) if soft < 0 else x
        e, hat = (math.log1p(math.exp(bounded)) - t * bounded for t in (y, r[b]))
        value += hat + (o / theta * (e - hat) if o else 0)
        if o:
            weight = 1 / theta if mode == "jl" else (1 - theta) / theta**2
            own = -(y * math.log(r[b]) + (1 - y) * math.log(1 - r[b])) if label else ((r[b] - y) * x) ** 2
            lesson += weight * own
    return value / len(z), lesson / len(z)


@pytest.mark.parametrize("mode", ["jl", "mrdr"])
@pytest.mark.parametrize("imputation", ["error", "label"])
@given(seed=st.integers(0, 50))
def test_value_and_both_gradients_are_those_of_the_two_steps(mode: str, imputation: str, seed: int) -> None:
    z, batch = small(seed=seed)
    made = loss(mode=mode, imputation=imputation, floor=0.1)
    z.requires_grad_()
    found = made({"y": z}, batch)
    found.backward()
    r = imputed(made, batch)
    label = imputation == "label"
    value, _ = by_hand(z.detach(), batch, r, 0.1, mode, label)
    assert float(found.detach()) == pytest.approx(value, rel=1e-6)  # what teaches the imputation model adds nothing
    with torch.no_grad():
        for b in range(3):  # ∂z: of the first line alone, r held fixed
            sides = []
            for sign in (1, -1):
                moved = z.detach().clone()
                moved[b] += sign * 1e-6
                sides.append(by_hand(moved, batch, r, 0.1, mode, label)[0])
            assert float(z.grad[b]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-7)  # type: ignore[index]
        for parameter, place in ((made.imputer.bias, (0,)), (made.imputer.first, (int(batch.ids[0, 0]), 0))):
            sides = []
            for sign in (1, -1):
                parameter[place] += sign * 1e-6
                sides.append(by_hand(z.detach(), batch, imputed(made, batch), 0.1, mode, label)[1])
                parameter[place] -= sign * 1e-6
            gradient = float(parameter.grad[place])  # type: ignore[index]
            assert gradient == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_no_gradient_reaches_theta() -> None:
    z, batch = small()
    theta = batch.context["propensity"].clone().requires_grad_()
    loss(mode="mrdr")(
        {"y": z.requires_grad_()}, replace(batch, context={**batch.context, "propensity": theta})
    ).backward()
    assert theta.grad is None


def test_labels_of_rows_that_were_not_observed_are_not_looked_at() -> None:
    z, batch = small()
    hidden = batch.context["observed"] == 0
    other = replace(batch, label={"y": torch.where(hidden, 1 - batch.label["y"], batch.label["y"])})
    assert float(loss()({"y": z}, batch).detach()) == float(loss()({"y": z}, other).detach())


def test_identities() -> None:
    """ê = e: the mean of ê whatever θ; ê = 0: inverse propensity scores; all seen for sure: the mean of e."""
    e, hat = torch.tensor([0.3, 1.2, 2.0]), torch.tensor([0.5, 0.1, 0.7])
    w = torch.tensor([4.0, 0.0, 1.5])
    assert torch.equal(doubly_robust(e, e, w), e)
    assert torch.equal(doubly_robust(e, torch.zeros(3), w), w * e)
    torch.testing.assert_close(doubly_robust(e, hat, torch.ones(3)), e)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_told_of_the_imputation_is_what_loops_find(seed: int) -> None:
    """Catches a correlation over unobserved rows, shares of other sums, and batches that are not added up."""
    made = loss(floor=0.1)
    assert isinstance(made, Summing)
    total, every, seen = made.sums(), [], []
    for part in range(2):
        z, rows = small(12, 2 * seed + part)
        rows = replace(rows, label={"y": torch.where(rows.context["observed"] != 0, rows.label["y"], 1e6)})
        made({"y": z.requires_grad_()}, rows)
        total = total + made.sums()
        for x, y, o, theta, r in zip(
            z.tolist(),
            rows.label["y"].tolist(),
            rows.context["observed"].tolist(),
            rows.context["propensity"].tolist(),
            imputed(made, rows),
            strict=True,
        ):
            w, guess = (1 / max(theta, 0.1) if o else 0.0), math.log1p(math.exp(x)) - r * x
            e = math.log1p(math.exp(x)) - y * x if o else 0.0
            every.append((guess, guess + w * (e - guess), w * e))
            seen += [(guess, e)] if o else []
    guess, robust, plain = np.array(every).T
    told = made.facts(total)
    want = {
        "imputed_mean": guess.mean(),
        "imputed_share": guess.sum() / robust.sum(),
        "imputed_ratio": np.array(seen)[:, 0].sum() / np.array(seen)[:, 1].sum(),
        "imputed_correlation": np.corrcoef(np.array(seen).T)[0, 1],
        "variance_saved": 1 - robust.var() / plain.var(),
    }
    assert told == pytest.approx(want, rel=1e-6)
    assert not total.requires_grad
    assert all(math.isnan(value) for value in made.facts(torch.zeros(12)).values())


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(RecipeError, match="no field 'itm' for the imputation model; fields: user, item, price"):
        DoublyRobust(("y",), SMALL, fields=("itm",))


def test_the_imputation_model_has_places_for_all_ids_and_none_shared() -> None:
    made = Imputer(SMALL, 1, 2, ("item", "user"))
    assert len(made.first) == 11
    with torch.no_grad():
        made.first.copy_(torch.arange(11.0)[:, None])
        made.vectors.zero_()  # type: ignore[union-attr]
    batch = Batch(torch.tensor([[5, 4, 1], [0, 0, 1]]))
    assert made(batch).flatten().tolist() == [5.0 + 10.0, 0.0 + 6.0]


def planted(**options: object) -> DoublyRobust:
    """With an imputation model that knows the true relevance, σ(P·Q − 1.2)."""
    made = DoublyRobust(("y",), PAIRS, dim=DIM, floor=0.001, **options).double()  # type: ignore[arg-type]
    w = world()
    with torch.no_grad():
        made.imputer.first.zero_()
        made.imputer.vectors.zero_()  # type: ignore[union-attr]
        made.imputer.bias.fill_(-1.2)
        made.imputer.vectors[2 : USERS + 2, 0] = torch.tensor(w.p)  # type: ignore[index]
        made.imputer.vectors[USERS + 4 :, 0] = torch.tensor(w.q)  # type: ignore[index]
    return made


def constant(rate: float) -> DoublyRobust:
    """With an imputation model that gives all pairs one label."""
    made = planted()
    with torch.no_grad():
        made.imputer.vectors.zero_()  # type: ignore[union-attr]
        made.imputer.bias.fill_(math.log(rate / (1 - rate)))
    return made


def test_right_if_either_part_is_and_wrong_if_neither() -> None:
    w = world()
    ideal, pairs = w.error.mean(), ids()
    wrong_theta = np.full_like(w.theta, 0.4)
    cases = {
        "both": (planted(), w.theta),
        "theta": (constant(0.9), w.theta),
        "imputed": (planted(), wrong_theta),
        "neither": (constant(0.9), wrong_theta),
    }
    found: dict[str, list[float]] = {name: [] for name in (*cases, "unweighed", "no_o", "ips", "flat")}
    logit = torch.tensor(w.logit)
    soft = {name: torch.sigmoid(made.imputer(Batch(pairs)).detach()[:, 0]).numpy() for name, (made, _) in cases.items()}
    hat = w.zero - soft["theta"] * w.logit
    with torch.no_grad():
        for index, (relevant, shown) in enumerate(w.draws()):
            errors = relevant * w.one + (1 - relevant) * w.zero
            weight = shown / w.theta
            found["unweighed"].append((hat + weight * errors - shown * hat).mean())  # a fake that is in wide use
            found["no_o"].append((hat + (errors - hat) / w.theta).mean())
            found["ips"].append((weight * errors).mean())
            args = (torch.tensor(errors), torch.full_like(logit, 0.2), torch.tensor(weight))
            found["flat"].append(float(doubly_robust(*args).mean()))
            if index >= 25:
                continue  # the whole loss, with its imputation model, on fewer draws
            for name, (made, theta) in cases.items():
                context = {"propensity": torch.tensor(theta), "observed": torch.tensor(shown).long()}
                rows = Batch(pairs, label={"y": torch.tensor(relevant)}, context=context)
                found[name].append(float(made({"y": logit}, rows)))
    for name in ("both", "theta", "imputed"):
        assert abs(z_score(found[name], ideal)) < 4, name
    assert abs(z_score(found["flat"], ideal)) < 4
    for name in ("neither", "unweighed", "no_o"):
        assert abs(z_score(found[name], ideal)) > 10, name
    gap = w.error - (w.zero - soft["neither"] * w.logit)
    bias = ((w.theta / 0.4 - 1) * gap).mean()
    assert abs(z_score(found["neither"], ideal + bias)) < 4
    # What is imputed rightly takes variance away: Var = Σ over pairs of what is left, by the law of total variance.
    assert np.std(found["both"]) < 0.8 * np.std(found["ips"])


def test_mrdr_leaves_less_variance_than_jl_on_planted_noise() -> None:
    """Of all constant imputations, the one that each mode ends at; exposure is rare where labels are mostly 1."""
    random = torch.Generator().manual_seed(0)
    rows = 4000
    rare = torch.rand(rows, generator=random, dtype=torch.float64) < 0.5
    theta = torch.where(rare, 0.05, 0.8)
    y = (torch.rand(rows, generator=random, dtype=torch.float64) < torch.where(rare, 0.9, 0.2)).double()
    z = torch.randn(rows, generator=random, dtype=torch.float64)
    schema = EncodedSchema((Field("user", 3),), (), ("y",))
    left = {}
    for mode in ("jl", "mrdr"):
        torch.manual_seed(0)
        made = DoublyRobust(("y",), schema, mode=mode, dim=0, floor=0.01).double()  # type: ignore[arg-type]
        search = torch.optim.LBFGS(made.parameters(), max_iter=50, line_search_fn="strong_wolfe")
        expected = theta * rows / theta.sum()  # every row, with the chance to be seen in its place
        batch = Batch(
            torch.zeros(rows, 1, dtype=torch.int64),
            label={"y": y},
            context={"propensity": theta, "observed": torch.ones(rows, dtype=torch.int64), "weight": expected},
        )

        def objective(made: DoublyRobust = made, batch: Batch = batch) -> torch.Tensor:
            made.zero_grad()
            r = torch.sigmoid(made.imputer(batch)[:, 0])
            made({"y": z}, batch).backward()
            weight = 1 / theta if made.mode == "jl" else (1 - theta) / theta**2
            return (batch.context["weight"] * weight * (z * (y - r)) ** 2).mean().detach()

        search.step(objective)  # type: ignore[arg-type]
        r = torch.sigmoid(made.imputer(batch)[:, 0]).detach()
        left[mode] = float(((1 - theta) / theta * (z * (y - r)) ** 2).sum())
    assert left["mrdr"] < 0.97 * left["jl"]
