"""Off-policy estimates: against planted truth, against scores of every action one by one, and on a public log."""

import json
import math
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recsys.testing import contract
from recsys_policy_value import PolicyValue, chances, effective, estimates

# A planted bandit: what every action would earn is known.

ROWS, ACTIONS = 2000, 6


@pytest.fixture(scope="module")
def bandit():
    """Contexts with the reward chances of all actions, and the chances with which two policies take them."""
    generator = np.random.default_rng(3)
    gamma = 1 / (1 + np.exp(-(generator.normal(size=(ROWS, ACTIONS)) - 1)))
    logging = np.exp(2.0 * gamma + generator.normal(size=(ROWS, ACTIONS)) / 2)
    target = np.exp(-3.0 * gamma)
    return gamma, logging / logging.sum(1, keepdims=True), target / target.sum(1, keepdims=True)


def draw(bandit, seed, q, wrong=None):
    gamma, logging, target = bandit
    generator = np.random.default_rng(seed)
    action = (generator.random((ROWS, 1)) > logging.cumsum(1)).sum(1).clip(max=ACTIONS - 1)
    rows = np.arange(ROWS)
    reward = generator.random(ROWS) < gamma[rows, action]
    theta = (logging if wrong is None else wrong)[rows, action]
    columns = (target[rows, action] / theta, reward, (target * q).sum(1), q[rows, action])
    return [torch.from_numpy(np.asarray(column, dtype=np.float64)) for column in columns]


def off(values, truth):
    values = np.array(values)
    return abs(values.mean() - truth) / (values.std(ddof=1) / math.sqrt(len(values)))


def repeated(bandit, q, wrong=None, level=0.9):
    gamma, _, target = bandit
    truth = (target * gamma).sum(1).mean()
    found, held, plain = {}, {}, []
    for seed in range(200):
        columns = draw(bandit, seed, q, wrong)
        plain.append(float(columns[1].mean()))
        for name, estimate in estimates(*columns, level).items():
            found.setdefault(name, []).append(estimate.value)
            held[name] = held.get(name, 0) + (estimate.low <= truth <= estimate.high)
    return truth, found, held, plain


def test_estimates_find_the_value_that_the_mean_reward_misses(bandit):
    bad = np.full((ROWS, ACTIONS), 0.5)
    truth, found, held, plain = repeated(bandit, bad)
    assert off(plain, truth) > 10
    assert abs(found["dm"][0] - truth) > 0.1
    for name in ("ips", "snips", "dr"):
        assert off(found[name], truth) < 4, name
        # 200 intervals at 90 %: 4 standard deviations are 17.
        assert 163 <= held[name] <= 197, (name, held[name])


def test_dr_is_right_if_the_propensities_or_the_model_are_and_varies_less(bandit):
    gamma, logging, _ = bandit
    uniform = np.full_like(logging, 1 / ACTIONS)
    noisy = gamma + 0.05
    truth, right, *_ = repeated(bandit, noisy)
    assert off(right["dr"], truth) < 4
    assert np.std(right["dr"]) < 0.95 * np.std(right["ips"])
    truth, model, *_ = repeated(bandit, gamma, uniform)
    assert off(model["dr"], truth) < 4
    assert off(model["snips"], truth) > 10
    truth, neither, *_ = repeated(bandit, np.full_like(gamma, 0.9), uniform)
    assert off(neither["dr"], truth) > 10


def test_the_policy_that_wrote_the_log_is_worth_its_mean_reward():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    imputed = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    found = estimates(torch.ones(5, dtype=torch.float64), reward, imputed, imputed, 0.95)
    half = 1.959963984540054 * float(reward.std()) / math.sqrt(5)
    for name in ("ips", "snips", "dr"):
        assert found[name].value == pytest.approx(0.4)
        assert (found[name].low, found[name].high) == pytest.approx((0.4 - half, 0.4 + half))


def test_rows_of_a_group_are_one_observation():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(40, generator=generator, dtype=torch.float64)
    reward = (torch.rand(40, generator=generator) < 0.5).double()
    zero = torch.zeros(40, dtype=torch.float64)
    once = estimates(weight, reward, zero, zero, 0.95)
    five = [column.repeat(5) for column in (weight, reward, zero, zero)]
    grouped = estimates(*five, 0.95, torch.arange(40).repeat(5) - 7)
    apart = estimates(*five, 0.95)
    for name in ("ips", "snips", "dr"):
        width = once[name].high - once[name].low
        assert grouped[name].high - grouped[name].low == pytest.approx(width)
        assert apart[name].high - apart[name].low == pytest.approx(width / math.sqrt(5), rel=0.03)


def test_snips_does_not_mind_the_scale_of_propensities_and_follows_the_rewards_level():
    weight = torch.tensor([0.5, 2.0, 1.0, 4.0], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    first, scaled = (estimates(c * weight, reward, zero, zero, 0.95) for c in (1.0, 3.0))
    assert scaled["snips"].value == pytest.approx(first["snips"].value)
    assert scaled["ips"].value == pytest.approx(3 * first["ips"].value)
    moved = estimates(weight, reward + 5, zero, zero, 0.95)
    assert moved["snips"].value == pytest.approx(first["snips"].value + 5)


def test_without_rewards_under_the_policy_there_are_no_bounds():
    weight, zero = torch.tensor([0.0, 3.0, 3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    found = estimates(weight, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), zero, zero, 0.95)
    assert found["ips"].value == 0
    assert math.isnan(found["ips"].low)
    assert effective(weight) == pytest.approx(2.0)
    assert effective(zero) == 0.0


def test_policies_of_scores():
    z = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
    assert chances(z, "greedy", 1.0).tolist() == [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    assert chances(z, "uniform", 1.0).tolist() == [[1 / 3] * 3] * 2
    soft = chances(z, "softmax", 0.5)
    assert soft[1].tolist() == pytest.approx(
        [math.exp(2 * v) / sum(math.exp(2 * u) for u in (1, 0, -1)) for v in (1, 0, -1)]
    )


def test_the_contract():
    contract("stage", PolicyValue, action="item")


# The stage, on logs written here.

RECIPE = """
data:
  source: {use: files, path: logs.csv}
  split: {by: column, column: part, test: test}
  label: y
  categorical: [item, kind, user]
  numeric: {age: {transform: raw}}
  context: {propensity: theta}
model: {embedding: {use: table, dim: 4}, interaction: fm, head: {wide: true}}
train: {epochs: 2, batch_size: 128, learning_rate: 1e-2, eval_batch_size: 64}
stages:
  - {use: fit}
  - {use: policy_value, action: item, follows: [kind], temperature: 0.7}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    generator = np.random.default_rng(5)
    n = 1600
    item = np.where(generator.random(n) < 0.5, 0, generator.integers(0, 5, n))
    theta = np.where(item == 0, 0.6, 0.1)
    user, age = generator.integers(0, 8, n), generator.normal(size=n).round(3)
    y = generator.random(n) < 0.2 + 0.1 * item
    part = np.where(np.arange(n) < 1000, "train", "test")
    kind = np.array(["a", "b"])[item % 2]
    columns = {"part": part, "item": item, "kind": kind, "user": user, "age": age, "theta": theta, "y": y.astype(int)}
    pl.DataFrame(columns).write_csv(tmp_path / "logs.csv")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments):
    from typer.testing import CliRunner

    from recsys.cli import app

    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exit_code:
        raise AssertionError(f"{result.exception!r} {result.output}")
    return result.stdout


def test_every_action_is_scored_as_predict_scores_it(folder):
    command("train", "recipe.yaml", "--out", "run")
    found = json.loads((folder / "run" / "2-policy_value" / "policy_value.json").read_text())
    test = pl.read_csv("logs.csv").filter(pl.col("part") == "test")
    p = []
    for item in range(5):
        test.with_columns(item=pl.lit(item), kind=pl.lit("ab"[item % 2])).write_csv("asked.csv")
        command("predict", "run", "--data", "asked.csv", "--out", "scores.csv")
        p.append(pl.read_csv("scores.csv")["score"].to_numpy())
    q = np.stack(p, 1)
    z = np.log(q / (1 - q))
    taken, y, theta = test["item"].to_numpy(), test["y"].to_numpy(), test["theta"].to_numpy()
    rows = np.arange(len(test))
    soft = np.exp(z / 0.7) / np.exp(z / 0.7).sum(1, keepdims=True)
    greedy = (z == z.max(1, keepdims=True)).astype(float)
    for name, chance in (("softmax", soft), ("greedy", greedy), ("uniform", np.full_like(soft, 0.2))):
        w = chance[rows, taken] / theta
        want = {
            "ips": (w * y).mean(),
            "snips": (w * y).sum() / w.sum(),
            "dm": (chance * q).sum(1).mean(),
            "dr": ((chance * q).sum(1) + w * (y - q[rows, taken])).mean(),
            "ess": w.sum() ** 2 / (w**2).sum(),
            "mean_weight": w.mean(),
            "rows": len(test),
        }
        for key, value in want.items():
            assert found[name][key] == pytest.approx(value, rel=1e-4), (name, key)
        assert found[name]["dr.low"] < found[name]["dr"] < found[name]["dr.high"]
    assert found["logged"]["ips"] == pytest.approx(y.mean())
    told = json.loads((folder / "run" / "metrics.json").read_text())["metrics"]
    assert told["test[policy=greedy]"] == found["greedy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages.1.action=itm"], "action: 'itm' is no categorical field"),
        (["stages.1.action=age"], "action: 'age' is no categorical field"),
        (["stages.1.follows=[knd]"], "follows: 'knd' is no categorical field"),
        (["data.context={group: user}"], "needs the chance of each logged action"),
        (["stages.1.split=valid"], "the data has no split 'valid'"),
    ],
)
def test_what_is_missing_is_told_before_training(folder, changes, message):
    with pytest.raises(AssertionError, match=message):
        command("train", "recipe.yaml", *changes, "--out", "run")
    assert not Path("run/1-fit").exists()


def test_what_the_rows_show_is_told_with_numbers(folder):
    fast = "train.epochs=1"
    with pytest.raises(AssertionError, match=r"follows: \['user'\] are not decided by 'item': its id \d comes with 8"):
        command("train", "recipe.yaml", fast, "stages.1.follows=[user]", "--out", "a")
    with pytest.raises(AssertionError, match=r"all 600 propensities lie below `floor` 0.9 \(the largest is 0.6\)"):
        command("train", "recipe.yaml", fast, "stages.1.floor=0.9", "--out", "b")
    with pytest.raises(
        AssertionError, match=r"the policy 'uniform' leaves [\d.]+ effective rows of 600 .* below `least"
    ):
        command("train", "recipe.yaml", fast, "stages.1.policies=[uniform]", "stages.1.least_ess=0.9", "--out", "c")
    logs = pl.read_csv("logs.csv")
    logs.with_columns(theta=pl.lit(0.9)).write_csv("logs.csv")
    assert "are 0.222 ± 0.000 on average, far from 1: the propensities do not fit the log" in " ".join(
        command("train", "recipe.yaml", fast, "stages.1.policies=[uniform]", "--out", "d").split()
    )
    for bad in ("0", "1.2", "NaN"):
        text = logs.with_columns(theta=pl.when(pl.col("user") == 3).then(pl.lit(bad)).otherwise(pl.col("theta")))
        text.write_csv("logs.csv")
        with pytest.raises(AssertionError, match=r"context propensity 'theta': expected a number in \(0, 1\]"):
            command("train", "recipe.yaml", fast, "--out", f"e{bad}")


# The public log of two policies.

BANDIT = Path(os.environ.get("RECSYS_DATA", "")) / "open_bandit_small"


def public(name):
    return pl.read_parquet(BANDIT / f"{name}.parquet")


@pytest.mark.skipif(not BANDIT.is_dir(), reason="needs RECSYS_DATA with open_bandit_small")
def test_open_bandit_each_policy_is_judged_from_the_others_log():
    def estimate(weight, click):
        w, r = (torch.from_numpy(np.asarray(column, dtype=np.float64).copy()) for column in (weight, click))
        return estimates(w, r, torch.zeros_like(w), torch.zeros_like(w), 0.95)

    def agree(estimate, click):
        own = click.std() / math.sqrt(len(click))
        spread = (estimate.high - estimate.low) / (2 * 1.96)
        return abs(estimate.value - click.mean()) < 1.96 * math.hypot(own, spread)

    random, thompson = public("men_random"), public("men_bts")
    for log in (random, thompson):  # its own policy: the weights are 1
        own = estimate(np.ones(len(log)), log["click"])["ips"]
        assert own.value == pytest.approx(log["click"].mean())
        assert own.low < log["click"].mean() < own.high
    uniform = estimate(1 / 34 / thompson["propensity_score"], thompson["click"])
    assert agree(uniform["ips"], random["click"])
    assert uniform["snips"].low < random["click"].mean() < uniform["snips"].high
    # Thompson sampling over the week, as shares of what it showed at each position.
    shares = thompson.group_by("position", "item_id").len().with_columns(n=pl.col("len").sum().over("position"))
    joined = random.join(shares, on=["position", "item_id"], how="left").fill_null(0)
    back = estimate((joined["len"] / joined["n"]).fill_nan(0) / joined["propensity_score"], joined["click"])
    assert agree(back["ips"], thompson["click"])
    assert agree(back["snips"], thompson["click"])
    women = public("women_bts")
    assert effective(torch.from_numpy((1 / 46 / women["propensity_score"]).to_numpy())) < 0.001 * len(women)


@pytest.mark.skipif(not BANDIT.is_dir(), reason="needs RECSYS_DATA with open_bandit_small")
def test_open_bandit_recipe(tmp_path):
    run = ("train", "open_bandit/policy_value.yaml", "train.epochs=1")
    told = json.loads(command(*run, "--out", tmp_path / "run", "--json").strip().splitlines()[-1])["metrics"]
    rate = told["test[policy=logged]"]["ips"]
    assert told["test[policy=uniform]"]["ips"] == pytest.approx(rate)
    assert told["test[policy=uniform]"]["ips.low"] < public("men_random")["click"].mean()
    assert told["test[policy=uniform]"]["ips.high"] > public("men_random")["click"].mean()
    whole = [f"open_bandit_small/women_{policy}.parquet" for policy in ("random", "bts")]
    source = f"data.source={{use: files, train: {whole[0]}, test: {whole[1]}}}"
    with pytest.raises(AssertionError, match=r"'uniform' leaves 2\.1 effective rows of 10,000 \(0\.02%\), below"):
        command(*run, "data.split=null", source, "stages.2.policies=[uniform]", "--out", tmp_path / "refused")
