"""Recipes that plant noise: trained, measured again, exported, and scored from raw rows that have no such columns."""

import json
from pathlib import Path

import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from recsys.data.simulate import Simulated
from recsys.data.sources import DataRoot

SMALL = ("train.threads=1", "train.epochs=1", "model.embedding.dim=4")
NOISE = "data.noise={copies: 3, random: [item], flags: 1, vectors: 1, width: 2, seed: 4}"
NAMES = [
    *("noise_copy_user", "noise_copy_item", "noise_copy_age", "noise_random_item", "noise_flag_1"),
    *("noise_vector_1_1", "noise_vector_1_2"),
]


@pytest.fixture
def files(tmp_path: Path) -> str:
    """Simulated logs in a file for each split, as an override of the source."""
    source = Simulated(DataRoot((tmp_path,)), rows=4000, seed=7)
    for split in ("train", "valid", "test"):
        source.scan(split).collect().write_parquet(tmp_path / f"{split}.parquet")
    paths = ", ".join(f"{split}: {tmp_path / split}.parquet" for split in ("train", "valid", "test"))
    return f"data.source={{use: files, {paths}}}"


def test_scores_of_a_run_of_its_export_and_of_raw_rows_are_the_same(recsys, tmp_path, files):
    run, stages = tmp_path / "run", "stages=[{use: fit}, {use: prune}, {use: evaluate}, {use: export}]"
    magnitude = "model.embedding={use: magnitude, dim: 4, budget: 0.3}"
    trained = json.loads(
        recsys("train", "quickstart", files, NOISE, *SMALL[:2], magnitude, stages, "--out", run, "--json")
    )
    test = tmp_path / "test.parquet"
    found = {}
    for folder in (run, run / "export"):
        again = json.loads(recsys("evaluate", folder, "--split", "test", "--json", "--data-root", tmp_path))
        assert again["metrics"]["test"]["auc"] == trained["metrics"]["test"]["auc"]
        recsys("predict", folder, "--data", test, "--keep", "y", "--out", tmp_path / "scores.parquet")
        found[folder.name] = pl.read_parquet(tmp_path / "scores.parquet")
    assert found["run"].equals(found["export"])
    assert found["run"]["score"].n_unique() > 300
    auc = roc_auc_score(found["run"]["y"], found["run"]["score"])
    assert auc == pytest.approx(trained["metrics"]["test"]["auc"], abs=1e-9), "raw rows draw what the test rows drew"


def test_it_is_among_the_fields_and_check_shows_it_as_what_it_is(recsys, tmp_path, files):
    shown = json.loads(recsys("check", "quickstart", files, NOISE, *SMALL, "--json"))
    assert shown["recipe"]["shapes"]["ids"] == ["B", "17"]
    text = recsys("check", "quickstart", files, NOISE, *SMALL)
    lines = [line.split()[:2] for line in text.splitlines() if line.startswith("noise_")]
    assert lines[:2] == [["noise_row", "categorical"], ["noise_user", "categorical"]], "columns of the logs themselves"
    assert lines[2:] == [[name, "noise"] for name in NAMES]


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("{copies: [usr]}", r"noise.copies: 'usr' is no .* field. Did you mean 'user'\? Fields: .*noise_user$"),
        ("{copy: 3}", r"data.noise.copy: unknown key. Did you mean 'copies'\? Keys: copies, flags, random, seed"),
        ("{flags: x}", r"data.noise.flags: expected int, got 'x'"),
        ("{copies: {}}", r"data.noise.copies: expected int or a list"),
        ("{copies: -1}", r"data.noise.copies: .*greater than or equal to 0"),
    ],
)
def test_mistakes_in_a_recipe_are_named(recsys, noise, message):
    with pytest.raises(SystemExit, match=message):
        recsys("check", "quickstart", f"data.noise={noise}")


def test_editors_know_the_key(recsys):
    schema = json.loads(recsys("schema", "json"))
    noise = schema["$defs"]["data.Noise"]["properties"]
    assert set(noise) == {"copies", "random", "flags", "vectors", "width", "seed"}
    assert all(option["description"] for option in noise.values())
