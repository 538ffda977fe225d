"""One run chooses, another uses its choice."""

import json
import shutil

import polars as pl
import pytest

from recsys.data.simulate import Simulated
from recsys.data.sources import DataRoot

BASE = ("train.epochs=1", "train.threads=1")
ROWS = 3000


def write_logs(folder, seed=7):
    source = Simulated(DataRoot(()), rows=ROWS, seed=seed)
    for split in ("train", "valid", "test"):
        source.scan(split).collect().write_parquet(folder / f"{split}.parquet")
    return (
        "data.source={use: files, " + ", ".join(f"{s}: {folder}/{s}.parquet" for s in ("train", "valid", "test")) + "}"
    )


def test_the_choice_of_a_run_is_used_by_another_and_refused_for_other_vocabularies(recsys, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    logs, others = write_logs(tmp_path / "one"), write_logs(tmp_path / "other", seed=8)
    stages = "stages=[{use: fit}, {use: prune}, {use: evaluate}]"
    recsys(
        *("train", "quickstart", logs, *BASE, "model.embedding={use: magnitude, dim: 4, budget: 0.3}", stages),
        *("--out", tmp_path / "first"),
    )
    fixed = f"model.selector={{use: fixed, from: {tmp_path / 'first'}}}"
    small = "stages=[{use: prune}, {use: fit}, {use: evaluate}, {use: export}]"
    recsys("train", "quickstart", logs, *BASE, "model.embedding.dim=4", fixed, small, "--out", tmp_path / "second")
    sizes = []
    for name, stage in (("first", "2-prune"), ("second", "1-prune")):
        sizes.append(json.loads((tmp_path / name / stage / "prune.json").read_text())["bytes_after"])
    assert sizes[0] == sizes[1]
    with pytest.raises(SystemExit, match=r"chose among|ids of other vocabularies"):
        recsys("train", "quickstart", others, *BASE, "model.embedding.dim=4", fixed, small, "--out", tmp_path / "third")
    # The same values in other numbers: the sizes are equal, the ids are not those that were meant.
    for split in ("train", "valid", "test"):
        path = tmp_path / "one" / f"{split}.parquet"
        frame = pl.read_parquet(path)
        names = [c for c, t in frame.schema.items() if c in ("city", "brand", "hour", "age", "category")]
        frame.with_columns([(pl.col(n).cast(pl.String) + "'").alias(n) for n in names]).write_parquet(path)
    with pytest.raises(SystemExit, match="ids of other vocabularies than those of this run"):
        recsys("train", "quickstart", logs, *BASE, "model.embedding.dim=4", fixed, small, "--out", tmp_path / "fourth")


def test_a_run_does_without_the_one_that_chose_for_it_once_it_has_pruned(recsys, tmp_path):
    logs = write_logs(tmp_path)
    first, second, rows = tmp_path / "first", tmp_path / "second", tmp_path / "test.parquet"
    embedding = "model.embedding={use: magnitude, dim: 4, budget: 0.3}"
    recsys("train", "quickstart", logs, *BASE, embedding, "stages=[{use: fit}, {use: prune}]", "--out", first)
    fixed, stages = f"model.selector={{use: fixed, from: {first}}}", "stages=[{use: prune}, {use: fit}, {use: export}]"
    recsys("train", "quickstart", logs, *BASE, "model.embedding.dim=4", fixed, stages, "--out", second)
    recsys("predict", second, "--data", rows, "--out", tmp_path / "before.parquet")
    shutil.rmtree(first)
    shutil.move(second / "export", tmp_path / "elsewhere")
    before = pl.read_parquet(tmp_path / "before.parquet")
    for folder in (second, tmp_path / "elsewhere"):
        recsys("predict", folder, "--data", rows, "--out", tmp_path / "after.parquet")
        assert pl.read_parquet(tmp_path / "after.parquet").equals(before)
