"""Bad logs through the commands: what `encode --strict` refuses, and rows to be scored, which all stay."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

Command = Callable[..., str]
RECIPE = """
data:
  source: {use: files, path: logs.csv}
  split: {by: hash}
  label: click
  categorical: {user: {}, city: {normalize: [nfc, strip, lower], max_bytes: 64}}
  numeric: [price]
model: {interaction: fm, embedding: {use: table, dim: 4, init_std: 0.5}}
train: {epochs: 1, batch_size: 64}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    user, city = 2**40 + rng.integers(0, 20, 300), np.array(["Café", "Rom", "Köln"])[rng.integers(0, 3, 300)]
    frame = pl.DataFrame({"user": user, "city": city, "price": rng.random(300).round(3), "click": user % 2})
    frame.write_csv(tmp_path / "logs.csv")
    frame.write_parquet(tmp_path / "logs.parquet")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path / "mine.yaml"


@pytest.fixture
def run(recsys: Command, tmp_path: Path, recipe: Path) -> Path:
    recsys("train", recipe, f"data.source.path={tmp_path}/logs.parquet", "--out", tmp_path / "run")
    return tmp_path / "run"


def test_b8_strict_refuses_columns_that_the_recipe_does_not_name(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    logs = pl.read_csv(tmp_path / "logs.csv")
    logs.with_columns(usr=1).write_csv(tmp_path / "logs.csv")
    told = json.loads(recsys("encode", recipe, "--json").splitlines()[-1])
    assert told["report"]["ignored"] == ["usr"]
    with pytest.raises(SystemExit, match=rf"{tmp_path}/logs\.csv: the recipe does not name column 'usr'.*'user'"):
        recsys("encode", recipe, "--strict")
    # A column that only some files have is read from none, and refused all the same.
    logs.write_csv(tmp_path / "part-1.csv")
    logs.with_columns(usr=1).write_csv(tmp_path / "part-2.csv")
    with pytest.raises(SystemExit, match=r"part-2\.csv: the recipe does not name column 'usr'"):
        recsys("encode", recipe, "data.source.path=part-*.csv", "--strict")
    logs.with_columns(ts=pl.int_range(300)).write_csv(tmp_path / "logs.csv")
    recsys("encode", recipe, "data.split={by: time, column: ts}", "--strict")
    (tmp_path / "cities.csv").write_text("city,land\nRom,it\n")
    with pytest.raises(SystemExit, match=r"cities\.csv: the recipe does not name column 'land'"):
        recsys(
            "encode",
            recipe,
            "data.split={by: time, column: ts}",
            "data.source.join=[{path: cities.csv, on: city}]",
            "--strict",
        )
    with pytest.raises(SystemExit, match="--strict is for encoding"):
        recsys("encode", recipe, "--strict", "--history", "user")


def test_b14_strict_sees_a_byte_that_size_time_and_samples_miss(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    path = tmp_path / "logs.csv"
    pl.concat([pl.read_csv(path)] * 100).write_csv(path)
    first = json.loads(recsys("encode", recipe, "--strict", "--json").splitlines()[-1])
    assert json.loads(recsys("encode", recipe, "--json").splitlines()[-1])["fingerprint"] == first["fingerprint"]
    stat, raw = path.stat(), bytearray(path.read_bytes())
    at = raw.index(b",0.", len(raw) * 7 // 30) + 3  # between two samples
    raw[at] = ord("1") if raw[at] != ord("1") else ord("2")
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = json.loads(recsys("encode", recipe, "--json").splitlines()[-1])
    assert (again["reused"], again["fingerprint"]) == (True, first["fingerprint"])
    second = json.loads(recsys("encode", recipe, "--strict", "--json").splitlines()[-1])
    assert (second["reused"], second["fingerprint"] == first["fingerprint"]) == (False, False)


def scores(recsys: Command, run: Path, path: Path) -> list[float]:
    out = path.with_name("scores.parquet")
    recsys("predict", run, "--data", path, "--out", out)
    found: list[float] = pl.read_parquet(out)["score"].to_list()
    return found


def test_b3_every_row_to_be_scored_stays(recsys: Command, tmp_path: Path, run: Path) -> None:
    values = ["1.0", "NaN", "inf", "-inf", "1e39", "", "0.5"]
    path = tmp_path / "new.csv"
    path.write_text("user,city,price\n" + "".join(f"{2**40},Rom,{v}\n" for v in values))
    told = recsys("predict", run, "--data", path, "--out", tmp_path / "scores.csv")
    assert "1 missing value in column 'price', 4 not finite values in column 'price'" in told
    found = pl.read_csv(tmp_path / "scores.csv")["score"].to_list()
    assert len(found) == len(values)
    assert len(set(found[1:6])) == 1
    assert len({found[0], found[1], found[6]}) == 3


CANNOT_BE_SCORED = [
    ("new.csv", b"user,city,price\n1,a,1\n1,a\n", r"new\.csv, line 3: 2 fields where the header has 3"),
    (
        "new.csv",
        b"user,city,price\n1,a,1\n1,\xff,2\n",
        r"new\.csv: cannot be read.*line 3 is not UTF-8|line 3: not UTF-8",
    ),
    ("new.csv", b"user,city,price\n1,a,1\n1,a\0,2\n", r"new\.csv, line 3: not UTF-8, or a NUL character"),
    ("new.csv", b"user,city,price\n1,a,1\n1,a,x\n", r"new\.csv, row 2, column 'price': 'x' is no number"),
    ("new.ndjson", b'{"user":1,"city":"a","price":1}\nnope\n', r"new\.ndjson, line 2: not JSON"),
    (
        "new.ndjson",
        b'{"user":1,"city":"a","price":1}\n{"user":[1]}\n',
        r"new\.ndjson, row 2, column 'user': expected",
    ),
    ("new.ndjson", b'{"user":1.5,"city":"a","price":1}\n', r"new\.ndjson, row 1, column 'user': 1\.5 is no whole"),
]


def test_b3_rows_that_cannot_be_scored_are_an_error_with_their_address(
    recsys: Command, tmp_path: Path, run: Path
) -> None:
    for name, text, told in CANNOT_BE_SCORED:
        path = tmp_path / name
        path.write_bytes(text)
        with pytest.raises(SystemExit, match=told):
            recsys("predict", run, "--data", path, "--out", tmp_path / "scores.csv")
        assert not (tmp_path / "scores.csv").exists()


def test_b27_large_ids_score_alike_whatever_holds_them(recsys: Command, tmp_path: Path, run: Path) -> None:
    frame = pl.read_parquet(tmp_path / "logs.parquet").drop("click").head(40)
    path = tmp_path / "new.arrow"
    frame.write_ipc(path)
    expected = scores(recsys, run, path)
    assert len(set(expected)) > 20
    for dtype in (pl.UInt64, pl.Int128, pl.Float64, pl.String):
        frame.with_columns(pl.col("user").cast(dtype)).write_ipc(path)
        assert scores(recsys, run, path) == expected, dtype
    unseen = frame.with_columns(user=pl.lit(7))
    unseen.write_ipc(path)
    unknown = scores(recsys, run, path)
    # The same lower 32 bits, and a number beyond 64 bits: unseen too, never the row of another id.
    frame.with_columns(user=(pl.col("user") + 2**32)).write_ipc(path)
    assert scores(recsys, run, path) == unknown
    frame.with_columns(user=pl.lit(10**20, pl.Int128)).write_ipc(path)
    assert scores(recsys, run, path) == unknown
    frame.with_columns(user=(pl.col("user") + 2**55).cast(pl.Float64)).write_ipc(path)
    with pytest.raises(
        SystemExit, match=rf"{path}, row 1, column 'user': .* is no whole number that its type can hold"
    ):
        scores(recsys, run, path)


def test_b28_text_is_normalised_alike_when_scoring(recsys: Command, tmp_path: Path, run: Path) -> None:
    path = tmp_path / "new.ndjson"

    def score(city: str) -> float:
        pl.DataFrame({"user": [2**40], "city": [city], "price": [0.5]}).write_ndjson(path)
        return scores(recsys, run, path)[0]

    assert score("Café") == score(" CAFE\u0301\u3000") == score("café")
    assert score("Café") != score("Cafe") == score("Oslo") == score("café" * 20) == score("x" * 1_000_000)


def test_b35_an_edited_vocabulary_is_refused(recsys: Command, tmp_path: Path, run: Path) -> None:
    pl.read_parquet(tmp_path / "logs.parquet").write_parquet(tmp_path / "new.parquet")
    path = run / "encoder" / "vocabulary" / "city.parquet"
    values = pl.read_parquet(path)
    values.reverse().write_parquet(path)
    for command in (
        ("predict", run, "--data", tmp_path / "new.parquet", "--out", tmp_path / "s.csv"),
        ("evaluate", run),
    ):
        with pytest.raises(SystemExit, match=rf"{path}: the vocabulary was altered after it was written"):
            recsys(*command)


def test_b8_columns_that_nobody_asked_for_do_not_matter_when_scoring(
    recsys: Command, tmp_path: Path, run: Path
) -> None:
    frame = pl.read_parquet(tmp_path / "logs.parquet").head(20)
    path = tmp_path / "new.parquet"
    frame.write_parquet(path)
    expected = scores(recsys, run, path)
    odd: dict[str, Any] = {"blob": pl.lit(b"x"), "nested": pl.struct(a=pl.lit([1])), "much": pl.lit(float("nan"))}
    frame.select("price", *[value.alias(name) for name, value in odd.items()], "city", "user").write_parquet(path)
    assert scores(recsys, run, path) == expected
