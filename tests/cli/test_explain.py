"""`recsys explain` against what the interaction itself says of the same rows, worked out without the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from rich.console import Console

from recsys.contracts import Batch
from recsys.plugin.registry import load_registry
from recsys.recipe.build import load_trained

Command = Callable[..., str]
ROWS = 500
FIELDS = ("shop", "item", "noise")
ODD = '''
import torch
from recsys.api import Component, hookimpl


class Odd(torch.nn.Module):
    """Explains itself by whatever shape there is."""

    def __init__(self, fields):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(len(fields)))
        self.width, self.is_logit = 1, True

    def forward(self, e):
        return (e.sum(2) * self.weight).sum(1, keepdim=True)

    def explain(self, e):
        b = torch.arange(1.0, len(e) + 1)
        sign = (-1.0) ** torch.arange(len(e))
        return {
            "signed": (sign * b).unsqueeze(1) * torch.tensor([1.0, 2.0, 3.0]),
            "heads": torch.arange(6.0).view(2, 3),
            "sets": torch.tensor([[True, False, True], [True, True, True], [False] * 3, [False, True, False]]),
            "votes": torch.tensor([4.0, 3.0, 2.0, 1.0]),
            "sizes": torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25]),
            "whole": torch.tensor(7.5),
            "each": b > len(e) / 4,
        }


@hookimpl
def recsys_components():
    return [Component("interaction", "odd", Odd), Component("interaction", "mute", Mute)]


class Mute(Odd):
    """Has nothing to say."""

    def explain(self, e):
        return {}
'''


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks that depend on whether shop and item are of one parity."""
    folder = tmp_path_factory.mktemp("logs")
    numbers = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        columns = {name: numbers.integers(0, 6, ROWS) for name in FIELDS}
        label = (columns["shop"] + columns["item"]) % 2
        pl.DataFrame({**columns, "label": label}).write_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def trained(recsys: Command, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train a model with these interactions and return the run."""
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))

    def train(interaction: Any, *options: object, epochs: int = 1) -> Path:
        recipe = {
            "data": {
                "source": {"use": "files", **{s: str(logs / f"{s}.parquet") for s in ("train", "valid", "test")}},
                "label": "label",
                "categorical": list(FIELDS),
            },
            "model": {"embedding": {"use": "table", "dim": 4, "init_std": 0.1}, "interaction": interaction},
            "train": {"epochs": epochs, "batch_size": 100, "learning_rate": 0.02, "patience": 0, "plateau_factor": 1},
            "stages": [{"use": "fit"}],
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        recsys("train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--json", *options)
        return tmp_path / "run"

    return train


def said(run: Path, logs: Path, rows: int, split: str = "test") -> dict[str, torch.Tensor]:
    """What the model's interactions say of the first rows, whose ids are looked up one by one."""
    _, loaded, _ = load_trained(run, load_registry(), Console(quiet=True))
    frame = pl.read_parquet(logs / f"{split}.parquet").head(rows)
    (block,) = loaded.encoder.transform(frame.lazy(), labels=False)
    ids = torch.from_numpy(np.stack([block.ids[name].astype(np.int64) for name in FIELDS], 1))
    return loaded.model.eval().explain(Batch(ids=ids))


def test_attention_is_averaged_over_rows_alone_in_json(
    recsys: Command, trained: Callable[..., Path], logs: Path
) -> None:
    run = trained({"use": "autoint", "layers": 2, "heads": 2, "width": 8})
    told = json.loads(recsys("explain", run, "--rows", 300, "--json"))
    assert (told["rows"], told["split"], told["fields"]) == (300, "test", list(FIELDS))
    assert list(told["interactions"]) == ["0.AutoInt"]
    wanted = said(run, logs, 300)
    attention = told["interactions"]["0.AutoInt"]
    assert list(attention) == ["attention.0", "attention.1"]
    for name, shown in attention.items():
        assert shown["axes"] == ["rows", "", "fields", "fields"]
        assert shown["shape"] == [300, 2, 3, 3]
        mean = torch.tensor(shown["mean"], dtype=torch.float64)
        assert torch.allclose(mean, wanted[f"0.AutoInt.{name}"].double().mean(0), atol=1e-6)
        assert torch.allclose(mean.sum(-1), torch.ones(2, 3, dtype=torch.float64), atol=1e-6)
        assert "mean_absolute" not in shown


def test_sparse_terms_are_named(recsys: Command, trained: Callable[..., Path], logs: Path) -> None:
    run = trained([{"use": "armnet", "heads": 1, "neurons": 4, "alpha": 2.0, "hidden": [4]}, "fm"], epochs=8)
    told = json.loads(recsys("explain", run, "--split", "train", "--rows", 400, "--json"))
    wanted = said(run, logs, 400, "train")
    armnet = told["interactions"]["0.ARMNet"]
    for name in ("importance", "terms", "term_neurons", "order"):
        assert "rows" not in armnet[name]["axes"]
        assert torch.allclose(torch.tensor(armnet[name]["mean"]), wanted[f"0.ARMNet.{name}"].float(), atol=1e-5)
    for name in ("local_importance", "weights", "support"):
        assert armnet[name]["axes"][0] == "rows"
        mean = wanted[f"0.ARMNet.{name}"].double().mean(0)
        assert torch.allclose(torch.tensor(armnet[name]["mean"], dtype=torch.float64), mean, atol=1e-5)
    weights = wanted["0.ARMNet.weights"].double().abs().mean(0)
    assert torch.allclose(torch.tensor(armnet["weights"]["mean_absolute"], dtype=torch.float64), weights, atol=1e-5)
    text = recsys("explain", run, "--split", "train", "--rows", 400, "--top", 2)
    assert "0.ARMNet · train, 400 rows" in text
    assert "1.FM · train, 400 rows" in text
    best = [name for name, member in zip(FIELDS, wanted["0.ARMNet.terms"][0].tolist(), strict=True) if member]
    shown_as = "all 3" if len(best) == 3 else ", ".join(best)
    line = next(line for line in text.split("term_neurons")[1].splitlines() if shown_as in line)
    assert f"{float(wanted['0.ARMNet.term_neurons'][0]):.4g}" in line


def test_the_pair_that_decides_comes_first(recsys: Command, trained: Callable[..., Path]) -> None:
    run = trained("fm", epochs=30)
    text = recsys("explain", run, "--top", 1)
    (line,) = [line for line in text.splitlines() if line.startswith("│")]
    assert {cell.strip() for cell in line.split("│")[1:3]} == {"shop", "item"}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    (tmp_path / "odd.py").write_text(ODD)
    return tmp_path / "odd.py"


def test_any_shape_of_any_plugin_is_shown(recsys: Command, trained: Callable[..., Path], odd: Path) -> None:
    run = trained("odd", "--plugin", odd)
    told = json.loads(recsys("explain", run, "--rows", 8, "--json", "--plugin", odd))["interactions"]["0.Odd"]
    assert {name: shown["axes"] for name, shown in told.items()} == {
        "signed": ["rows", "fields"],
        "heads": ["", "fields"],
        "sets": ["", "fields"],
        "votes": [""],
        "sizes": [""],
        "whole": [],
        "each": ["rows"],
    }
    assert told["signed"]["mean"] == [-0.5, -1.0, -1.5]  # 1 − 2 + 3 − … − 8 over eight rows
    assert told["signed"]["mean_absolute"] == [4.5, 9.0, 13.5]
    assert told["whole"]["mean"] == 7.5
    assert told["each"]["mean"] == 0.75
    text = recsys("explain", run, "--rows", 8, "--plugin", odd)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert cells[:3] == [["noise", "-1.5", "13.5"], ["item", "-1", "9"], ["shop", "-0.5", "4.5"]]
    assert cells[3:6] == [["noise", "3.5"], ["item", "2.5"], ["shop", "1.5"]]  # the mean over the two heads
    assert cells[6:10] == [["shop, noise", "4"], ["all 3", "3"], ["none", "2"], ["item", "1"]]
    assert cells[10:13] == [["1", "0.25"], ["2", "0.5"], ["4", "0.25"]]
    assert cells[13:] == [["", "7.5"], ["", "0.75"]]


def test_nothing_to_show_is_said(recsys: Command, trained: Callable[..., Path], odd: Path) -> None:
    run = trained(["mute", "mlp"], "--plugin", odd)
    assert "the interactions of this run have nothing to show" in recsys("explain", run, "--plugin", odd)
    assert json.loads(recsys("explain", run, "--json", "--plugin", odd))["interactions"] == {}


def test_mistakes_are_named(recsys: Command, trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained("fm")
    with pytest.raises(SystemExit, match=r"no split 'tset'\. Did you mean 'test'\? Splits: train, valid, test"):
        recsys("explain", run, "--split", "tset")
    with pytest.raises(SystemExit, match="no run folder"):
        recsys("explain", tmp_path / "nowhere")
    told = json.loads(recsys("explain", run, "--rows", 100_000, "--json"))
    assert told["rows"] == ROWS
    assert math.isfinite(told["interactions"]["0.FM"]["pairs"]["mean"][0][1])


@pytest.mark.parametrize("stages", ["[{use: fit}]", "[{use: fit}, {use: prune}, {use: fit, name: again}]"])
def test_a_selectors_scores_come_first_also_when_it_is_pruned_away(
    recsys: Command, trained: Callable[..., Path], stages: str
) -> None:
    options = ("model.selector={use: leap, one_level: 0.1, warmup: 0, share: 0.67}", f"stages={stages}")
    run = trained({"use": "mlp", "hidden": [16]}, *options, epochs=4)
    told = json.loads(recsys("explain", run, "--json"))["selector"]
    gates = json.loads((run / "1-fit" / "gates.json").read_text())["fields"]
    assert told == {name: pytest.approx(gates[name]["gate"]) for name in FIELDS}
    assert len(set(told.values())) == 3
    text = recsys("explain", run, "--top", 2)
    best = sorted(told, key=lambda name: -told[name])
    assert text.index("selector") < text.index(best[0]) < text.index(best[1])
    assert f"{told[best[0]]:.4g}" in text
    assert best[2] not in text


def test_without_a_selector_there_are_no_scores(recsys: Command, trained: Callable[..., Path]) -> None:
    assert "selector" not in json.loads(recsys("explain", trained("mlp"), "--json"))
