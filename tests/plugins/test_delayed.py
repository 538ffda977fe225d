"""Losses of late conversions against their formulas, planted rates, and streams built event by event."""

import math

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import Batch, EncodedSchema, Field
from recsys.data.sources import DataRoot
from recsys.errors import DataError
from recsys.testing import contract
from recsys_delayed import DFM, FNW, ConversionStream

SCHEMA = EncodedSchema((Field("a", 5), Field("b", 6)), (), ("label",), ("delay", "elapsed"))


def sigma(x):
    return 1 / (1 + math.exp(-x))


def batch(label, delay=None, elapsed=None, weight=None):
    columns = {"delay": delay, "elapsed": elapsed, "weight": weight}
    context = {name: torch.tensor(v, dtype=torch.float64) for name, v in columns.items() if v is not None}
    ids = torch.arange(len(label)).remainder(5)[:, None].repeat(1, 2)
    return Batch(ids, label={"label": torch.tensor(label, dtype=torch.float64)}, context=context)


def test_fnw_and_its_gradient_row_by_row():
    xs, ys, ws = [-2.0, 0.3, 1.5, -0.7], [1, 0, 0, 1], [1.0, 2.0, 0.5, 1.0]
    x = torch.tensor(xs, dtype=torch.float64, requires_grad=True)
    value = FNW(("label",))({"label": x}, batch(ys, weight=ws))
    total, slopes = 0.0, []
    for a, y, w in zip(xs, ys, ws, strict=True):
        p = sigma(a)
        total += w * (-(1 + p) * math.log(p) if y else -(1 - p) * (1 + p) * math.log(1 - p))
        slopes.append(w * (-(1 + p) * (1 - p) if y else (1 - p) * (1 + p) * p) / 4)  # weights give no gradient
    assert value.item() == pytest.approx(total / 4, rel=1e-12)
    value.backward()
    torch.testing.assert_close(x.grad, torch.tensor(slopes, dtype=torch.float64))


def settled(slope):
    """Where a slope that is negative below and positive above changes its sign; the upper end if it never does."""
    low, high = -12.0, 12.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return sigma((low + high) / 2)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.8])
def test_the_weights_bring_the_doubled_stream_to_the_rate_of_conversions_and_the_mistake_does_not(p):
    """Of each click there is a row with label 0, and with probability p one with label 1."""

    def slope(loss, x):
        z = torch.full((2,), x, dtype=torch.float64, requires_grad=True)
        loss({"label": z}, batch([1, 0], weight=[p, 1.0])).backward()
        return z.grad.sum().item()

    assert settled(lambda x: slope(FNW(("label",)), x)) == pytest.approx(p, abs=1e-6)

    def plain(logits, data):
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits["label"], data.label["label"], data.context["weight"]
        )

    b = settled(lambda x: slope(plain, x))
    assert b == pytest.approx(p / (1 + p), abs=1e-6)
    assert b / (1 - b) == pytest.approx(p, abs=1e-5)  # what FNC serves
    logit = math.log(b / (1 - b))
    assert sigma(-math.log(math.exp(-logit) - 1)) == pytest.approx(p, abs=1e-5)
    # Made small together with the weights, the loss of the stream has its least value at certainty.
    grid = [i / 1000 for i in range(1, 1000)]
    assert min(grid, key=lambda q: -(1 + q) * (p * math.log(q) + (1 - q) * math.log(1 - q))) > 0.99


@settings(max_examples=50, deadline=None)
@given(st.floats(-20, 20), st.floats(0, 50), st.floats(-3, 3), st.integers(0, 1))
def test_dfm_is_the_likelihood_of_one_click(x, time, raw, y):
    loss = DFM(("label",), SCHEMA).double()
    torch.nn.init.zeros_(loss.head.weight)
    torch.nn.init.constant_(loss.bias, raw)
    rate, p = math.log1p(math.exp(raw)) + 1e-6, sigma(x)
    want = -math.log(p * rate) + rate * time if y else -math.log(sigma(-x) + p * math.exp(-rate * time))
    # The column that a row does not read may hold anything.
    data = batch([y], [time if y else math.nan], [math.inf if y else time])
    z = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    value = loss({"label": z}, data)
    assert value.item() == pytest.approx(want, rel=1e-9, abs=1e-12)
    value.backward()
    gone = math.exp(-rate * time)
    slope = p - 1 if y else p * sigma(-x) * (1 - gone) / (sigma(-x) + p * gone)
    assert z.grad.item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert math.isfinite(loss.bias.grad.item())


def test_after_long_enough_no_conversion_is_a_negative():
    loss = DFM(("label",), SCHEMA).double()
    x = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    plain = torch.nn.functional.softplus(x).mean().item()
    assert loss({"label": x}, batch([0, 0], [0.0, 0.0], [1e6, 1e6])).item() == pytest.approx(plain)
    assert loss({"label": x}, batch([0, 0], [0.0, 0.0], [0.0, 0.0])).item() == pytest.approx(0.0, abs=1e-12)


def test_dfm_finds_planted_rate_and_delay_where_the_naive_mean_is_far_off():
    g = torch.Generator().manual_seed(0)
    n, p, rate = 40_000, 0.30, 0.50
    age = torch.rand(n, generator=g, dtype=torch.float64) * 4
    delay = torch.empty(n, dtype=torch.float64).exponential_(rate, generator=g)
    seen = (torch.rand(n, generator=g) < p) & (delay < age)
    naive = seen.double().mean().item()
    assert naive == pytest.approx(0.171, abs=0.008)
    loss = DFM(("label",), SCHEMA).double()
    torch.nn.init.zeros_(loss.head.weight)
    loss.head.weight.requires_grad_(False)
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(n, 2, dtype=torch.int64)
    data = Batch(ids, label={"label": seen.double()}, context={"delay": delay.where(seen, 0.0), "elapsed": age})
    optimizer = torch.optim.LBFGS([z, loss.bias], lr=1.0, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss({"label": z.expand(n)}, data)
        value.backward()
        return value

    optimizer.step(closure)
    found, speed = torch.sigmoid(z).item(), loss.rates(data)[0, 0].item()
    assert found == pytest.approx(p, abs=0.02)
    assert speed == pytest.approx(rate, abs=0.05)
    assert abs(naive - p) > 0.1


def clicks(tmp_path, rows=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    at = (torch.rand(rows, generator=g) * 1000).round()
    late = torch.empty(rows).exponential_(1 / 150, generator=g).round()
    does = torch.rand(rows, generator=g) < 0.4
    frame = pl.DataFrame(
        {
            "row": range(rows),
            "click_time": at.long().tolist(),
            "conversion_time": [int(a + d) if c else None for a, d, c in zip(at, late, does, strict=True)],
        }
    )
    frame.write_parquet(tmp_path / "clicks.parquet")
    return frame


def source(tmp_path, **options):
    return ConversionStream(DataRoot((tmp_path,), None), path="clicks.parquet", **options)


def test_the_stream_is_what_a_training_would_have_met(tmp_path):
    log = clicks(tmp_path)
    ordered = sorted(r["click_time"] for r in log.to_dicts())
    now = ordered[320]  # equal times stay together, behind the cut
    rows = {
        form: source(tmp_path, form=form, unit=10.0).scan("train").collect() for form in ("stream", "snapshot", "final")
    }
    want, once, known = [], {}, {}
    for r in log.to_dicts():
        if r["click_time"] >= now:
            continue
        want.append((r["click_time"], 0, r["row"]))
        converted = r["conversion_time"] is not None
        seen = converted and r["conversion_time"] < now
        once[r["row"]] = (int(seen), (r["conversion_time"] - r["click_time"]) / 10 if seen else 0.0)
        known[r["row"]] = int(converted)
        if seen:
            want.append((r["conversion_time"], 1, r["row"]))
    got = list(rows["stream"].select("event_time", "label", "row").iter_rows())
    assert sorted(got) == sorted(want)
    assert [g[:2] for g in got] == sorted(g[:2] for g in got)
    assert len(got) == len(once) + sum(label for label, _ in once.values())
    found = {r["row"]: (r["label"], r["delay"]) for r in rows["snapshot"].to_dicts()}
    assert found.keys() == once.keys()
    assert all(found[row] == pytest.approx(once[row]) for row in once)
    for r in rows["snapshot"].to_dicts():
        assert r["elapsed"] == pytest.approx((now - r["click_time"]) / 10)
    assert {r["row"]: r["label"] for r in rows["final"].to_dicts()} == known
    assert sum(known.values()) > sum(label for label, _ in once.values())  # or the test could tell nothing apart


def test_later_clicks_are_judged_once_by_what_came_of_them(tmp_path):
    log = clicks(tmp_path)
    frames = [source(tmp_path).scan(split).collect() for split in ("train", "valid", "test")]
    own = [set(frame["row"].to_list()) for frame in frames]
    assert sorted(row for part in own for row in part) == list(range(len(log)))  # no click twice
    truth = dict(zip(log["row"], log["conversion_time"].is_not_null().cast(pl.Int8), strict=True))
    for frame in frames[1:]:
        assert all(truth[row] == label for row, label in frame.select("row", "label").iter_rows())
    assert frames[0]["click_time"].max() < frames[1]["click_time"].min() <= frames[2]["click_time"].min()


def test_what_is_wrong_with_the_log_is_told(tmp_path):
    log = clicks(tmp_path)
    with pytest.raises(DataError, match="no column 'clicked'"):
        source(tmp_path, click_time="clicked").scan("train")
    with pytest.raises(DataError, match="no 'holdout' split; it gives train, valid, test"):
        source(tmp_path).scan("holdout")
    log.with_columns(conversion_time=pl.col("click_time") - 1).write_parquet(tmp_path / "clicks.parquet")
    with pytest.raises(DataError, match="400 conversions come before their click"):
        source(tmp_path).scan("train")
    log.with_columns(label=1).write_parquet(tmp_path / "clicks.parquet")
    with pytest.raises(DataError, match="the column 'label' is in the way"):
        source(tmp_path).scan("train")


@pytest.mark.parametrize("label", [[0] * 4, [1] * 4])
@pytest.mark.parametrize("name", ["fnw", "dfm"])
def test_finite_where_logits_and_delays_are_extreme(name, label):
    loss = FNW(("label",)) if name == "fnw" else DFM(("label",), SCHEMA)
    x = torch.tensor([90.0, -90.0, 90.0, -90.0], requires_grad=True)
    data = batch(label, delay=[0.0, 0.0, 400.0, 400.0], elapsed=[0.0, 400.0, 400.0, 0.0])
    value = loss({"label": x}, data)
    value.backward()
    assert math.isfinite(value.item())
    assert bool(torch.isfinite(x.grad).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in loss.parameters() if p.grad is not None)


def test_contract():
    contract.without("bce_equality")("loss", FNW)
    contract.without("bce_equality")("loss", DFM)
