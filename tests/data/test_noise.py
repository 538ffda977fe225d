"""Planted noise: the same for a row however it is read, distributed as it says, and telling nothing of the label."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import FIRST_ID, NULL_ID, UNKNOWN_ID
from recsys.data import numeric
from recsys.data.doctor import examine
from recsys.data.encode import Encoder
from recsys.data.encode_pass import EncodePass
from recsys.data.hashing import hash_text
from recsys.data.prepare import Prepared, prepare
from recsys.data.reading import source_rows
from recsys.data.schema import DataConfig
from recsys.data.shards import Shards
from recsys.data.simulate import Simulated
from recsys.data.sources import DataRoot, Files
from recsys.data.split import split_rows
from recsys.errors import DataError

WORD = (1 << 64) - 1
ROWS = 60_000


def config(noise: dict[str, Any], **block: Any) -> DataConfig:
    fields = {"categorical": {"c": {}, "rare": {"min_count": 30}}, "numeric": ["n"], "label": "y"}
    return DataConfig.model_validate({"source": {}, **fields, "noise": noise, **block})


def log(rows: int = ROWS, seed: int = 0) -> pl.DataFrame:
    """Fields of which `c` and `n` say much about the label, with missing values and values too rare for an id."""
    rng = np.random.default_rng(seed)
    c = np.minimum(rng.geometric(0.1, rows), 40)
    missing = rng.random(rows) < 0.1
    rare = np.minimum(rng.zipf(1.3, rows), 2000)
    label = rng.random(rows) < np.where(c < 8, 0.2, 0.7)
    frame = pl.DataFrame({"c": c, "rare": rare, "n": np.round(rng.normal(size=rows), 1), "y": label.astype(int)})
    return frame.with_columns(c=pl.when(pl.col("c") != 3).then("c"), n=pl.when(pl.Series(~missing)).then("n"))


EVERYTHING = {"copies": ["c", "rare", "n"], "random": ["c", "rare"], "flags": 2, "vectors": 2, "width": 3, "seed": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    log().write_parquet(tmp_path / "logs.parquet")
    return tmp_path


def made(folder: Path, block: DataConfig, **source: Any) -> Prepared:
    key = "train" if block.split is None else "path"
    files = Files(DataRoot((folder,)), **(source or {key: "logs.parquet"}))
    return prepare(block, files, folder / "cache")


def columns(shards: Shards) -> dict[str, np.ndarray]:
    """Every input as one column: ids, or numbers of numeric ones with NaN where missing."""
    batch = shards.gather(np.arange(len(shards)))
    found = {}
    for i, field in enumerate(shards.schema.fields):
        ids = batch.ids[:, i].numpy()
        found[field.name] = np.where(ids == NULL_ID, np.nan, batch.values[:, i].numpy()) if field.numeric else ids
    return found | {"y": batch.label["label"].numpy()}


def mixed(z: int) -> int:
    """The finaliser of SplitMix64."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def uniform(seed: int, name: str, row: int, shift: int = 0) -> float:
    """The number of one row, in Python's own integers."""
    stream = (hash_text(name) + shift) * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019
    key = mixed(mixed((seed + 0x9E3779B97F4A7C15) & WORD) ^ (stream & WORD))
    return ((mixed((key + (row + 1) * 0x9E3779B97F4A7C15) & WORD) >> 11) + 0.5) * 2.0**-53


@settings(deadline=None, max_examples=25)
@given(
    values=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=8, max_size=40),
    seed=st.integers(-5, 2**63),
    batch=st.integers(1, 50),
)
def test_every_value_is_that_of_a_reference_which_draws_one_row_at_a_time(
    values: list[str | None], seed: int, batch: int
) -> None:
    values = ["a", "a", "b", *values]
    numbers = [None if i % 7 == 3 else float(i % 5) for i in range(len(values))]
    frame = pl.DataFrame({"c": values, "n": numbers, "y": [i % 2 for i in range(len(values))]})
    plan = {"copies": ["c", "n"], "random": "c", "flags": 1, "vectors": 1, "width": 2, "seed": seed}
    fields = {"categorical": {"c": {"min_count": 2}}, "numeric": {"n": {"transform": "raw"}}}
    block = DataConfig.model_validate({"source": {}, "label": "y", **fields, "noise": plan, "batch_rows": batch})
    encoder = Encoder.fit(frame.lazy(), block)
    parts = list(encoder.transform(frame.lazy(), labels=False))
    ids = {name: np.concatenate([p.ids[name] for p in parts]) for name in parts[0].ids}
    real = sorted(ids["c"].tolist())  # the empirical distribution, one entry a row
    known = [*sorted(x for x in numbers if x is not None), *[math.nan] * numbers.count(None)]
    different = len(set(real) - {NULL_ID, UNKNOWN_ID})
    rows = range(len(values))
    assert ids["noise_copy_c"].tolist() == [real[int(uniform(seed, "test noise_copy_c", i) * len(real))] for i in rows]
    assert ids["noise_random_c"].tolist() == [
        FIRST_ID + int(uniform(seed, "test noise_random_c", i) * different) for i in rows
    ]
    assert ids["noise_flag_1"].tolist() == [FIRST_ID + (uniform(seed, "test noise_flag_1", i) < 0.01) for i in rows]
    drawn = np.concatenate([p.values["noise_copy_n"] for p in parts])
    np.testing.assert_equal(
        drawn, np.float32([known[int(uniform(seed, "test noise_copy_n", i) * len(known))] for i in rows])
    )
    for name in ("noise_vector_1_1", "noise_vector_1_2"):
        wanted = [
            math.sqrt(-2 * math.log(uniform(seed, f"test {name}", i)))
            * math.cos(2 * math.pi * uniform(seed, f"test {name}", i, 1 << 20))
            for i in rows
        ]
        np.testing.assert_allclose(np.concatenate([p.values[name] for p in parts]), wanted, rtol=1e-5, atol=1e-6)


def test_the_names_come_after_the_real_ones_and_say_what_they_are() -> None:
    block = config({"copies": 5, "random": ["c", "c"], "flags": 2, "vectors": 2, "width": 2})
    assert block.planted == (
        "noise_copy_c",
        "noise_copy_rare",
        "noise_copy_n",
        "noise_copy_c_2",
        "noise_copy_rare_2",
        "noise_random_c",
        "noise_random_c_2",
        "noise_flag_1",
        "noise_flag_2",
        "noise_vector_1_1",
        "noise_vector_1_2",
        "noise_vector_2_1",
        "noise_vector_2_2",
    )
    assert block.columns(labels=False) == ("c", "rare", "n"), "what is planted is not read from the logs"
    assert config({}).planted == ()
    encoder = Encoder.fit(log(3000).lazy(), block)
    assert tuple(f.name for f in encoder.schema.fields) == ("c", "rare", "n", *block.planted)
    assert [f.name for f in encoder.schema.fields if f.numeric] == ["n", "noise_copy_n", *block.planted[-4:]]


def test_as_many_ids_as_the_real_field_and_the_values_as_often(folder: Path) -> None:
    prepared = made(folder, config(EVERYTHING, split={"by": "hash", "valid": 0.0, "test": 0.2}))
    rows = {field.name: field.rows for field in prepared.encoder.schema.fields}
    for name in ("c", "rare"):
        assert rows[f"noise_copy_{name}"] == rows[f"noise_random_{name}"] == rows[name]
    assert rows["noise_flag_1"] == FIRST_ID + 2
    train = columns(prepared.splits["train"])
    for found in (train, columns(prepared.splits["test"])):
        for name in ("c", "rare"):
            real = np.bincount(train[name], minlength=rows[name]) / len(train[name])
            copy = np.bincount(found[f"noise_copy_{name}"], minlength=rows[name])
            assert not copy[real == 0].any()
            assert chi_square(copy[real > 0], real[real > 0]) < 5
            assert copy[NULL_ID] > 0 or name == "rare"
            assert copy[UNKNOWN_ID] > 0 or name == "c", "values too rare for an id are copied as such"
            drawn = np.bincount(found[f"noise_random_{name}"], minlength=rows[name])
            assert not drawn[:FIRST_ID].any()
            assert (drawn[FIRST_ID:] > 0).all(), "as many different ones as the field has"
            assert chi_square(drawn[FIRST_ID:], np.full(rows[name] - FIRST_ID, 1 / (rows[name] - FIRST_ID))) < 5
        real, copy = train["n"], found["noise_copy_n"]
        assert abs(np.isnan(copy).mean() - np.isnan(real).mean()) < 0.01
        values = np.unique(real[~np.isnan(real)])
        assert set(copy[~np.isnan(copy)]) <= set(values), "the very numbers"
        gaps = [abs((real <= v).mean() - (copy <= v).mean()) for v in values]
        assert max(gaps) < 2 / math.sqrt(len(copy))
        for flag in ("noise_flag_1", "noise_flag_2"):
            share = (found[flag] == FIRST_ID + 1).mean()
            assert set(found[flag]) == {FIRST_ID, FIRST_ID + 1}
            assert abs(share - 0.01) < 5 * math.sqrt(0.01 * 0.99 / len(found[flag]))
        vectors = np.stack([found[f"noise_vector_{i}_{j}"] for i in (1, 2) for j in (1, 2, 3)])
        np.testing.assert_allclose(np.cov(vectors), np.eye(6), atol=8 / math.sqrt(vectors.shape[1]))
        np.testing.assert_allclose((vectors**4).mean(1), 3, atol=0.4)


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    """How many standard deviations the statistic is above its mean."""
    wanted = shares * counts.sum()
    free = len(counts) - 1
    return float((((counts - wanted) ** 2 / wanted).sum() - free) / math.sqrt(2 * free))


def excess_information(a: np.ndarray, b: np.ndarray) -> float:
    """The mutual information of two columns of ids, in standard deviations above what independent ones have."""
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(table, (a.astype(int), b.astype(int)), 1)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    wanted = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    statistic = 2 * (table * np.log(np.maximum(table, 1e-9) / wanted)).sum()  # chi-square under independence
    free = (table.shape[0] - 1) * (table.shape[1] - 1)
    return float((statistic - free) / math.sqrt(2 * free))


def bins(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == np.int64 else np.where(np.isnan(x), 0, np.digitize(x, [-1, -0.5, 0, 0.5, 1]) + 1)


def test_noise_tells_nothing_of_the_label_of_what_it_copies_and_of_other_noise(folder: Path) -> None:
    found = columns(made(folder, config({**EVERYTHING, "copies": 6})).splits["train"])
    label = found.pop("y")
    assert excess_information(bins(found["c"]), label) > 100, "the measure finds a real dependence"
    noise = [name for name in found if name.startswith("noise_")]
    assert len(noise) == 16
    for name in noise:
        assert excess_information(bins(found[name]), label) < 5, name
    for i, name in enumerate(noise):
        for other in ["c", "n", *noise[:i]]:
            assert excess_information(bins(found[name]) % 7, bins(found[other]) % 7) < 5, (name, other)
        assert excess_information(bins(found[name])[1:] % 7, bins(found[name])[:-1] % 7) < 5, "from row to row"


def test_it_is_the_same_in_blocks_of_any_size_in_several_files_and_beside_other_noise(folder: Path) -> None:
    split = {"by": "hash", "valid": 0.1, "test": 0.1}
    whole = made(folder, config(EVERYTHING, split=split))
    small = made(folder, config(EVERYTHING, split=split, batch_rows=997, shard_rows=5000))
    for i, part in enumerate(log().iter_slices(7001)):
        part.write_ndjson(folder / f"part-{i}.ndjson")
    several = made(folder, config(EVERYTHING, split=split), path="part-*.ndjson")
    more = made(folder, config({**EVERYTHING, "copies": 7, "vectors": 3, "flags": 0}, split=split))
    assert len({p.folder for p in (whole, small, several, more)}) == 4, "other noise is encoded apart"
    for name, shards in whole.splits.items():
        wanted = columns(shards)
        for other in (small, several):
            found = columns(other.splits[name])
            assert list(found) == list(wanted)
            for column in wanted:
                np.testing.assert_array_equal(found[column], wanted[column], column)
        found = columns(more.splits[name])
        for column in set(wanted) & set(found):
            np.testing.assert_array_equal(found[column], wanted[column])


def test_another_seed_gives_other_noise_of_the_same_kind_and_leaves_the_real_inputs(folder: Path) -> None:
    a, b = (columns(made(folder, config({**EVERYTHING, "seed": s})).splits["train"]) for s in (1, 2))
    for name in a:
        assert np.array_equal(a[name], b[name], equal_nan=True) == (not name.startswith("noise_")), name
    agree = (a["noise_random_c"] == b["noise_random_c"]).mean()
    assert abs(agree - 1 / 39) < 0.01


def test_a_row_draws_by_its_number_in_the_logs_whatever_the_split_and_the_rows_set_aside(folder: Path) -> None:
    frame = log()
    bad = frame.with_columns(n=pl.when(pl.int_range(pl.len()) % 5000 == 17).then(math.nan).otherwise("n"))
    bad.write_parquet(folder / "logs.parquet")
    plan = {"random": "c", "vectors": 1, "width": 2}
    parts = made(folder, config(plan, split={"by": "hash", "columns": ["rare"], "valid": 0.2, "test": 0.2}))
    rows = source_rows(Files(DataRoot((folder,)), path="logs.parquet"), "all", "the logs")
    (every,) = parts.encoder.transform(rows, labels=False)  # to be scored: every row stays
    kept = np.arange(ROWS) % 5000 != 17
    assert sum(len(shards) for shards in parts.splits.values()) == kept.sum() == ROWS - 12
    number, place = _words(every.values), []
    order = np.argsort(number)
    for shards in parts.splits.values():
        found = columns(shards)
        at = order[np.searchsorted(number[order], _words(found))]
        assert (np.diff(at) > 0).all(), "in the order of the logs"
        for name in ("c", "rare", "noise_random_c"):
            np.testing.assert_array_equal(found[name], every.ids[name][at])
        place += at.tolist()
    assert sorted(place) == np.flatnonzero(kept).tolist()


def _words(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Two numbers of a row as one that no other row has."""
    a, b = (np.asarray(found[f"noise_vector_1_{i}"], np.float32).view(np.uint32).astype(np.uint64) for i in (1, 2))
    return a << np.uint64(32) | b


def test_given_splits_draw_apart_and_rows_to_be_scored_draw_as_test_rows(folder: Path) -> None:
    same = log(2000)
    for name in ("train", "valid", "test"):
        same.write_parquet(folder / f"{name}.parquet")
    prepared = made(folder, config(EVERYTHING), **{s: f"{s}.parquet" for s in ("train", "valid", "test")})
    found = {name: columns(shards) for name, shards in prepared.splits.items()}
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert np.array_equal(found[a]["c"], found[b]["c"])
        assert abs(np.corrcoef(found[a]["noise_vector_1_1"], found[b]["noise_vector_1_1"])[0, 1]) < 0.1
    source = Files(DataRoot((folder,)), path="test.parquet")
    (block,) = prepared.encoder.transform(source_rows(source, "all", "the logs"), labels=False)
    for name in prepared.encoder.config.planted:
        got = block.ids[name] if name in block.ids else block.values[name]
        np.testing.assert_array_equal(got, found["test"][name])


def test_of_very_many_numbers_a_sample_is_kept_that_no_block_size_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numeric, "SAMPLE_ROWS", 1000)
    frame = log(20_000)
    found = [
        Encoder.fit(frame.lazy(), config({"copies": ["n"]}, batch_rows=rows)).marginals["n"] for rows in (77, 20_000)
    ]
    np.testing.assert_array_equal(*found)
    assert len(found[0]) == 1000
    values = frame["n"].fill_null(math.nan).to_numpy()
    scaled = (values - np.nanmean(values)) / np.nanstd(values)
    for v in np.unique(scaled[~np.isnan(scaled)]):
        assert abs((scaled <= v + 1e-6).mean() - (found[0] <= v + 1e-6).mean()) < 2 / math.sqrt(1000)


def test_broken_off_encoding_goes_on_to_the_same_noise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = config(EVERYTHING, split={"by": "hash"}, batch_rows=5000)
    whole = made(folder, block)
    monkeypatch.setattr("recsys.data.encode_pass.SAVE_SECONDS", 0.0)
    encode, calls = EncodePass._encode, []

    def stops(self: EncodePass, raw: Any) -> None:
        calls.append(raw.end)
        if len(calls) == 6:
            raise DataError("stopped") from OSError("power cut")
        encode(self, raw)

    monkeypatch.setattr(EncodePass, "_encode", stops)
    files = Files(DataRoot((folder,)), path="logs.parquet")
    with pytest.raises(DataError, match="stopped"):
        prepare(block, files, folder / "other")
    again = prepare(block, files, folder / "other")
    assert calls.count(5000) == 1, "it went on, and did not begin anew"
    assert again.fingerprint == whole.fingerprint


def test_an_encoder_is_read_back_as_it_was_and_an_altered_one_refused(folder: Path) -> None:
    prepared = made(folder, config(EVERYTHING))
    stored = folder / "encoder"
    prepared.encoder.save(stored)
    again = Encoder.load(stored)
    frame = log(500, seed=9).lazy()
    (a,), (b,) = (list(e.transform(frame, labels=False)) for e in (prepared.encoder, again))
    for name in a.ids:
        np.testing.assert_array_equal(a.ids[name], b.ids[name])
    for name in a.values:
        np.testing.assert_array_equal(a.values[name], b.values[name])
    for name in ("c", "n"):
        path = stored / "noise" / f"{name}.parquet"
        before = path.read_bytes()
        pl.DataFrame({"value": [1, 2]}).write_parquet(path)
        with pytest.raises(DataError, match=rf"noise/{name}.parquet: the copied field was altered"):
            Encoder.load(stored)
        path.write_bytes(before)
    body = json.loads((stored / "encoder.json").read_text())
    del body["marginals"]["n"]
    (stored / "encoder.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="how often 'n' has each value is missing"):
        Encoder.load(stored)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"copies": ["d"]}, r"noise.copies: 'd' is no categorical or numeric field. Fields: c, rare, n"),
        ({"copies": ["rar"]}, r"noise.copies: 'rar' is no categorical or numeric field. Did you mean 'rare'\?"),
        ({"copies": "tags"}, r"'tags' is no categorical or numeric field"),
        ({"random": ["n"]}, r"noise.random: 'n' is no categorical field. Fields: c, rare"),
        ({"copies": -1}, "greater than or equal to 0"),
        ({"flags": -1}, "greater than or equal to 0"),
        ({"flags": True}, "valid integer"),
        ({"width": 0}, "greater than or equal to 1"),
        ({"vector": 1}, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_planted_is_refused(noise: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(noise, multi_valued=["tags"])


@pytest.mark.parametrize(
    ("block", "by"),
    [
        ({"categorical": ["c", "noise_copy_c"]}, "categorical"),
        ({"numeric": ["noise_copy_c"]}, "numeric"),
        ({"label": "noise_copy_c"}, "label 'label'"),
        ({"context": {"group": "noise_copy_c"}}, "context group"),
        ({"sequences": {"noise_copy_c": {"columns": {"c": "h"}}}}, "sequences"),
        ({"categorical": ["c", "c_2"], "noise": {"copies": ["c", "c", "c_2"]}}, "noise"),
    ],
)
def test_a_name_that_is_taken_is_refused(block: dict[str, Any], by: str) -> None:
    given = {"source": {}, "label": "y", "categorical": ["c"], "noise": {"copies": ["c"]}, **block}
    with pytest.raises(ValueError, match=rf"noise: 'noise_copy_c(_2)?' is to be planted, .* taken by {by}; rename"):
        DataConfig.model_validate(given)


def test_copies_of_hashed_shared_and_bucketed_fields(folder: Path) -> None:
    fields = {
        "categorical": {"c": {}, "rare": {"share": "c"}, "h": {"hash_buckets": 5}},
        "numeric": {"n": {"transform": "quantile", "buckets": 4}},
    }
    frame = log().with_columns(h="rare")
    frame.write_parquet(folder / "logs.parquet")
    prepared = made(folder, config({"copies": 4, "random": 3}, **fields))
    schema = {f.name: f for f in prepared.encoder.schema.fields}
    found = columns(prepared.splits["train"])
    assert all(schema[name].shares is None for name in prepared.encoder.config.planted), "with rows of their own"
    for name in ("c", "rare", "h", "n"):
        real = np.bincount(found[name], minlength=schema[name].rows)
        copy = np.bincount(found[f"noise_copy_{name}"], minlength=schema[name].rows)
        assert chi_square(copy[real > 0], real[real > 0] / ROWS) < 5
        assert not copy[real == 0].any()
    assert schema["noise_random_h"].rows == FIRST_ID + 5
    assert sorted(set(found["noise_random_h"])) == [2, 3, 4, 5, 6]


def test_other_sources_get_it_too(tmp_path: Path) -> None:
    fields = {"source": {}, "label": "y", "categorical": ["user", "item", "hour"], "noise": {"copies": 3, "flags": 1}}
    block = DataConfig.model_validate(fields)
    prepared = prepare(block, Simulated(DataRoot((tmp_path,)), rows=20_000, seed=3), tmp_path / "cache")
    small = prepare(
        block.model_copy(update={"batch_rows": 333}),
        Simulated(DataRoot((tmp_path,)), rows=20_000, seed=3),
        tmp_path / "cache",
    )
    for name, shards in prepared.splits.items():
        found, other = columns(shards), columns(small.splits[name])
        assert all(np.array_equal(found[c], other[c]) for c in found)
        assert excess_information(found["noise_copy_item"], found["y"]) < 5


def test_the_examination_of_the_logs_sees_it_and_copies_stay_copies(folder: Path) -> None:
    log(3000).write_parquet(folder / "logs.parquet")
    found = {}
    for plan in ({}, EVERYTHING):
        block = config(plan, split={"by": "hash", "valid": 0.0, "test": 0.3})
        parts = split_rows(Files(DataRoot((folder,)), path="logs.parquet"), block.split)
        found[bool(plan)] = examine(parts, block, Encoder.fit(parts["train"], block))
    assert found[True].duplicates == found[False].duplicates, "equal rows are equal still"
    assert found[True].duplicates.across["test", "train"].inputs > 0
    aucs = found[True].aucs["label"]
    assert {name: auc for name, auc in aucs.items() if "noise" not in name} == found[False].aucs["label"]
    assert all(abs(auc - 0.5) < 0.06 for name, auc in aucs.items() if name.startswith("noise_"))
    assert aucs["c"] > 0.6
