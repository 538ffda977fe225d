"""From files to shards: caching, races, several files, and real data sets."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.data import prepare as prepare_module
from recsys.data.batches import TrainBatches
from recsys.data.prepare import prepare
from recsys.data.schema import DataConfig
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError

needs_data = pytest.mark.skipif("RECSYS_DATA" not in os.environ, reason="the variable RECSYS_DATA is not set")


def config(**block: Any) -> DataConfig:
    return DataConfig.model_validate({"source": {}, "label": "y", "categorical": ["c"], **block})


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"c": rng.integers(0, 99, 2000), "n": rng.normal(size=2000), "y": rng.integers(0, 2, 2000)})
    frame.write_parquet(tmp_path / "logs.parquet")
    return tmp_path


def files(folder: Path) -> Files:
    return Files(DataRoot((folder,)), path="logs.parquet")


def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []
    original = prepare_module._build

    def counting(config: Any, source: Any, folder: Path, progress: Any) -> None:
        made.append(folder)
        original(config, source, folder, progress)

    monkeypatch.setattr(prepare_module, "_build", counting)
    return made


def test_the_same_recipe_and_files_are_encoded_once(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = builds(monkeypatch)
    block = config(split={"by": "hash"})
    first = prepare(block, files(logs), logs / "cache")
    second = prepare(block, files(logs), logs / "cache")
    assert len(made) == 1
    assert (second.folder, second.fingerprint, second.report) == (first.folder, first.fingerprint, first.report)
    prepare(config(split={"by": "hash"}, defaults={"min_count": 2}), files(logs), logs / "cache")
    assert len(made) == 2
    pl.read_parquet(logs / "logs.parquet").head(1500).write_parquet(logs / "logs.parquet")
    third = prepare(block, files(logs), logs / "cache")
    assert len(made) == 3
    assert sum(map(len, third.splits.values())) == 1500
    assert third.fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_content(logs: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    pl.read_parquet(logs / "logs.parquet").write_parquet(tmp_path / "elsewhere" / "logs.parquet")
    block = config(split={"by": "hash"})
    here = prepare(block, files(logs), logs / "cache")
    there = prepare(block, files(tmp_path / "elsewhere"), logs / "cache")
    assert here.folder != there.folder
    assert here.fingerprint == there.fingerprint


def test_racing_processes_end_with_one_result(logs: Path) -> None:
    block = config(split={"by": "hash"}, numeric=["n"])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: prepare(block, files(logs), logs / "cache"), range(4)))
    assert len({f.folder for f in found}) == 1
    assert [p.name for p in (logs / "cache").iterdir()] == [found[0].folder.name]
    assert len(found[0].splits["train"].gather(np.arange(10))) == 10


def test_a_failure_leaves_no_rubbish(logs: Path) -> None:
    with pytest.raises(DataError, match="no column 'd'"):
        prepare(config(categorical=["d"], split={"by": "hash"}), files(logs), logs / "cache")
    assert list((logs / "cache").iterdir()) == []


class Memory:
    """A source that cannot say what its rows are, so nothing may be kept for later."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame

    def scan(self, split: str) -> pl.LazyFrame:
        return self.frame.lazy()


def test_sources_without_identity_are_encoded_anew(tmp_path: Path) -> None:
    block = config(split={"by": "hash", "valid": 0.0, "test": 0.5})
    frame = pl.DataFrame({"c": [1, 2] * 20, "y": [0, 1] * 20})
    first = prepare(block, Memory(frame), tmp_path)
    second = prepare(block, Memory(frame.reverse()), tmp_path)
    assert first.folder != second.folder
    bad = frame.with_columns(y=pl.when(pl.int_range(pl.len()) == 4).then(7).otherwise("y"))
    with pytest.raises(DataError, match=r"row 5, label column 'y': expected 0 or 1, found 7"):
        prepare(config(), Memory(bad), tmp_path)


def test_progress_is_told(logs: Path) -> None:
    told: list[tuple[str, int]] = []
    block = config(split={"by": "hash", "valid": 0.0, "test": 0.5}, batch_rows=300)
    prepared = prepare(block, files(logs), logs / "cache", progress=lambda what, rows: told.append((what, rows)))
    assert told[0] == ("learn vocabularies", 300)
    assert told[-1] == ("encode train, test", sum(map(len, prepared.splits.values())))
    rows = [r for what, r in told if what == "encode train"]
    assert rows == sorted(set(rows))


def test_small_shards_give_the_same_batches(logs: Path) -> None:
    one = prepare(config(split={"by": "hash"}), files(logs), logs / "cache").splits["train"]
    many = prepare(config(split={"by": "hash"}, shard_rows=97), files(logs), logs / "cache").splits["train"]
    for a, b in zip(TrainBatches(one, 128, 3).epoch(0), TrainBatches(many, 128, 3).epoch(0), strict=True):
        assert a.ids.equal(b.ids)
        assert a.label["label"].equal(b.label["label"])


@needs_data
def test_frappe(tmp_path: Path) -> None:
    root = DataRoot((Path(os.environ["RECSYS_DATA"]),))
    names = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
    source = Files(root, **{s: f"frappe/{s}.parquet" for s in ("train", "valid", "test")})
    block = DataConfig.model_validate({"source": {}, "label": "label", "categorical": names})
    prepared = prepare(block, source, tmp_path)
    assert {k: len(v) for k, v in prepared.splits.items()} == {"train": 202_027, "valid": 57_722, "test": 28_860}
    raw = source.scan("test").collect()
    batch = prepared.splits["test"].gather(np.arange(28_860))
    assert batch.label["label"].tolist() == raw["label"].to_list()
    vocabulary = prepared.encoder.lookups["item"].values.to_list()  # type: ignore[union-attr]
    seen = [vocabulary[i - 2] if i >= 2 else None for i in batch.ids[:, 1].tolist()]
    known = set(vocabulary)
    assert seen == [v if v in known else None for v in raw["item"].to_list()]


@needs_data
def test_adult(tmp_path: Path) -> None:
    root = DataRoot((Path(os.environ["RECSYS_DATA"]),))
    source = Files(root, train="adult/train.parquet", test="adult/test.parquet")
    block = DataConfig.model_validate(
        {"source": {}, "label": "label", "categorical": ["workclass", "sex"], "numeric": ["age", "capital_gain"]}
    )
    prepared = prepare(block, source, tmp_path)
    batch = prepared.splits["train"].gather(np.arange(32_561))
    raw = source.scan("train").collect()
    assert batch.values is not None
    age = raw["age"].cast(pl.Float64)
    np.testing.assert_allclose(batch.values[:, 2], (age - age.mean()) / age.std(ddof=0), atol=1e-5)
    assert prepared.report.splits["train"].columns["workclass"].null == raw["workclass"].null_count() == 1836


@needs_data
def test_movielens_with_side_tables(tmp_path: Path) -> None:
    root = DataRoot((Path(os.environ["RECSYS_DATA"]),))
    join = tuple({"path": f"movielens_100k/{n}s.parquet", "on": f"{n}_id"} for n in ("user", "movie"))
    source = Files(root, path="movielens_100k/ratings.parquet", join=join)  # type: ignore[arg-type]
    block = DataConfig.model_validate(
        {
            "source": {},
            "split": {"by": "column", "column": "fold", "valid": [4], "test": [5]},
            "label": {"like": {"column": "rating", "at_least": 4}},
            "categorical": ["user_id", "movie_id", "gender", "occupation"],
            "numeric": {"age": {"transform": "quantile", "buckets": 6}},
            "multi_valued": {"genres": {"max_length": 6}},
            "context": {"group": "user_id", "time": "timestamp"},
        }
    )
    prepared = prepare(block, source, tmp_path)
    assert {k: len(v) for k, v in prepared.splits.items()} == {"train": 60_000, "valid": 20_000, "test": 20_000}
    raw = pl.read_parquet(Path(os.environ["RECSYS_DATA"]) / "movielens_100k/ratings.parquet").filter(
        pl.col("fold") == 5
    )
    batch = prepared.splits["test"].gather(np.arange(20_000))
    assert batch.label["like"].tolist() == (raw["rating"] >= 4).cast(pl.Float64).to_list()
    assert batch.context["time"].tolist() == raw["timestamp"].to_list()
    movies = dict(
        pl.read_parquet(Path(os.environ["RECSYS_DATA"]) / "movielens_100k/movies.parquet")[
            "movie_id", "genres"
        ].iter_rows()
    )
    names = prepared.encoder.lookups["genres"].values.to_list()  # type: ignore[union-attr]
    ids, length = batch.history["genres"]
    for row in (0, 77, 19_999):
        found = [names[i - 2] for i in ids[row, : int(length[row]), 0].tolist()]
        assert found == movies[raw["movie_id"][row]][-6:]
