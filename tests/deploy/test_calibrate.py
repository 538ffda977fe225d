"""Calibration finds planted curves, agrees with slow references, and reaches the scores of a bundle."""

import json
from pathlib import Path

import made
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys import cli
from recsys.deploy.calibrate import fit_curve
from recsys.deploy.calibration import Calibration, Curve, sigmoid
from recsys.deploy.predictor import load
from recsys.deploy.reliability import reliability
from recsys.errors import BundleError


def drawn(slope: float, shift: float, count: int = 60_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model that is wrong by a factor and a shift, and labels."""
    random = np.random.default_rng(3)
    z = random.normal(-1.0, 2.0, count)
    return z, (random.random(count) < sigmoid(slope * z + shift)).astype(np.float64)


def logloss(p: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(p.tolist(), y.tolist(), strict=True):
        total -= np.log(a) if b else np.log1p(-a)
    return total / len(y)


@pytest.mark.parametrize("slope", [0.4, 1.0, 2.5])
def test_a_planted_temperature_is_found(slope: float) -> None:
    z, y = drawn(slope, 0.0)
    curve = fit_curve(z, y, "temperature")
    assert curve.temperature == pytest.approx(1 / slope, rel=0.03)
    assert curve.shift == 0.0
    for other in (0.97, 1.03):
        worse = Curve("temperature", curve.temperature * other)
        assert logloss(worse(z), y) > logloss(curve(z), y)


def test_a_planted_shift_is_found_and_no_neighbour_is_better() -> None:
    z, y = drawn(0.7, -1.2)
    curve = fit_curve(z, y, "platt")
    assert 1 / curve.temperature == pytest.approx(0.7, abs=0.02)
    assert curve.shift == pytest.approx(-1.2, abs=0.04)
    best = logloss(curve(z), y)
    assert best < logloss(fit_curve(z, y, "temperature")(z), y) - 0.01
    for slope, shift in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.02), (0.0, -0.02)):
        other = Curve("platt", 1 / (1 / curve.temperature + slope), curve.shift + shift)
        assert logloss(other(z), y) > best


def test_weights_count_as_that_many_rows() -> None:
    z, y = drawn(0.7, -0.5, 3000)
    weight = np.arange(3000) % 4 + 0.0
    repeated = np.repeat(np.arange(3000), weight.astype(int))
    for method in ("temperature", "platt"):
        weighted, plain = fit_curve(z, y, method, weight), fit_curve(z[repeated], y[repeated], method)
        assert weighted.temperature == pytest.approx(plain.temperature, rel=1e-6)
        assert weighted.shift == pytest.approx(plain.shift, abs=1e-6)


def slow_isotonic(z: list[float], y: list[float]) -> dict[float, float]:
    """The minimax formula, with equal logits pooled first: max over lower ends of min over upper ends of the mean."""
    levels = sorted(set(z))
    hits = [[b for a, b in zip(z, y, strict=True) if a == level] for level in levels]
    found = {}
    for i, level in enumerate(levels):
        best = -1.0
        for j in range(i + 1):
            least = min(float(np.mean([b for group in hits[j : k + 1] for b in group])) for k in range(i, len(levels)))
            best = max(best, least)
        found[level] = best
    return found


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=14))
def test_isotonic_is_the_nearest_rising_function(rows: list[tuple[int, bool]]) -> None:
    z, y = [float(a) for a, _ in rows], [float(b) for _, b in rows]
    curve = fit_curve(np.array(z), np.array(y), "isotonic")
    curve.check()
    least = 1 / (len(z) + 2)
    for level, p in slow_isotonic(z, y).items():
        assert float(curve(np.array([level]))[0]) == pytest.approx(min(max(p, least), 1 - least), abs=1e-12)


def test_isotonic_of_many_rows_is_calibrated_and_small() -> None:
    z, _ = drawn(1.0, 0.0)
    random = np.random.default_rng(5)
    y = (random.random(len(z)) < np.clip(0.1 + 0.2 * (z > 0) + 0.3 * (z > 1.5), 0, 1)).astype(np.float64)
    curve = fit_curve(z, y, "isotonic")
    assert len(curve.logits) <= 2000
    got = curve(np.array([-3.0, 0.8, 2.5]))
    np.testing.assert_allclose(got, [0.1, 0.3, 0.6], atol=0.03)
    groups = reliability(curve(z), y)
    assert float((groups.rows * np.abs(groups.predicted - groups.observed)).sum() / len(y)) < 0.005


def test_a_bundle_applies_its_calibration_and_its_golden_rows_know(tmp_path: Path) -> None:
    curves = Calibration(
        {"click": Curve("platt", 2.0, -1.0), "buy": Curve("isotonic", 1.0, 0.0, (-1.0, 1.0), (0.2, 0.6))}
    )
    data = {**made.DATA, "label": {"click": "click", "buy": "buy"}}
    made.write(tmp_path / "bundle", data, calibration=curves)
    predictor = load(tmp_path / "bundle")
    assert predictor.bundle.manifest["calibration"] == {"click": "platt", "buy": "isotonic"}
    scores = predictor.predict(made.LOGS)
    z = scores.logit["click"]
    np.testing.assert_allclose(scores.probability["click"], 1 / (1 + np.exp(-(z / 2 - 1))), rtol=1e-12)
    z = scores.logit["buy"]
    np.testing.assert_allclose(scores.probability["buy"], np.clip(0.2 + 0.2 * (z + 1), 0.2, 0.6), rtol=1e-12)
    assert np.abs(scores.logit["click"] - scores.logit["buy"]).max() > 0.01


@pytest.mark.parametrize(
    "change",
    [{"method": "magic"}, {"temperature": 0.0}, {"method": "isotonic"}, {"logits": "x"}],
    ids=str,
)
def test_a_calibration_that_is_none_is_refused(change: dict[str, object]) -> None:
    good = Calibration.none(("click",)).to_json()
    assert Calibration.of_json(good, ("click",)) == Calibration.none(("click",))
    with pytest.raises(BundleError, match=r"calibration.json: not a calibration of click"):
        Calibration.of_json({"click": {**good["click"], **change}}, ("click",))
    with pytest.raises(BundleError, match=r"calibration.json"):
        Calibration.of_json({}, ("click",))


def train(monkeypatch: pytest.MonkeyPatch, out: Path, stages: str) -> None:
    words = ["recsys", "train", "quickstart", "--out", str(out), "data.source.rows=8000", "train.threads=1", stages]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.mark.bundle
def test_from_the_command_line_to_calibrated_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    fit = "{use: fit, epochs: 4}"
    train(
        monkeypatch,
        tmp_path / "run",
        f"stages=[{fit}, {{use: calibrate, method: platt, plot: true}}, {{use: export, bundle: true}}]",
    )
    told = json.loads((tmp_path / "run" / "2-calibrate" / "calibrate.json").read_text())
    assert told["valid"]["label"]["after"]["logloss"] <= told["valid"]["label"]["before"]["logloss"]
    assert set(told) == {"valid", "test"}
    drawing = (tmp_path / "run" / "2-calibrate" / "valid-label.svg").read_text()
    assert "<svg" in drawing
    curve = json.loads((tmp_path / "run" / "calibration.json").read_text())["label"]
    predictor = load(tmp_path / "run" / "bundle")
    scores = predictor.predict(predictor.bundle.lines("golden/requests.jsonl"))
    expected = 1 / (1 + np.exp(-(scores.logit["label"] / curve["temperature"] + curve["shift"])))
    np.testing.assert_allclose(scores.probability["label"], expected, rtol=1e-12)
    assert curve["shift"] != 0.0
    with pytest.raises(AssertionError):
        train(monkeypatch, tmp_path / "wrong", f"stages=[{fit}, {{use: calibrate}}, {{use: prune}}]")
    assert "3-prune may change the model after 2-calibrate; put 2-calibrate behind it" in capsys.readouterr().err
