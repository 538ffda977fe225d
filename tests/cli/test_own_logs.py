"""A modeller's own logs: every format, other types at prediction time, and what is told about bad values."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

Command = Callable[..., str]
MODEL = "model: {interaction: fm, embedding: {use: table, dim: 4}}\ntrain: {epochs: 1, batch_size: 64}\n"


def logs(rows: int = 400) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    user, city = rng.integers(0, 20, rows), np.array(["Köln", "a,b", 'q"x', "東京"])[rng.integers(0, 4, rows)]
    frame = pl.DataFrame(
        {
            "user": user,
            "city": city,
            "price": np.round(rng.exponential(size=rows), 3),
            "ts": np.arange(rows) + 10**9,
            "click": (rng.random(rows) < 0.2 + 0.03 * user).astype(int),
        }
    )
    return frame.with_columns(pl.when(pl.col("user") != 3).then(pl.col("city")).alias("city"))


def write(frame: pl.DataFrame, path: Path) -> Path:
    match path.suffix:
        case ".parquet":
            frame.write_parquet(path)
        case ".csv":
            frame.write_csv(path)
        case ".tsv":
            frame.write_csv(path, separator="\t")
        case ".ndjson":
            frame.write_ndjson(path)
        case _:
            frame.write_ipc(path)
    return path


@pytest.fixture
def recipe(recsys: Command, tmp_path: Path) -> Path:
    """What `schema infer` says of Parquet logs, with a model."""
    path = write(logs(), tmp_path / "logs.parquet")
    (tmp_path / "recipe.yaml").write_text(recsys("schema", "infer", path) + MODEL)
    return tmp_path / "recipe.yaml"


def test_equal_values_score_equally_in_every_format_and_type(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    run = tmp_path / "run"
    recsys("train", recipe, "--out", run)
    new = logs().tail(60)
    enum = pl.Enum([str(i) for i in range(30)])
    others = {
        "as.csv": new,
        "as.tsv": new,
        "as.ndjson": new,
        "as.arrow": new,
        "text.parquet": new.with_columns(pl.col("user", "price").cast(pl.String)),
        "categories.arrow": new.with_columns(pl.col("city").cast(pl.Categorical)),
        "enum.arrow": new.with_columns(pl.col("user").cast(pl.String).cast(enum)),
        "floats.parquet": new.with_columns(pl.col("user").cast(pl.Float64)),
        "floats.csv": new.with_columns(pl.col("user").cast(pl.Float64)),
        "decimal.parquet": new.with_columns(pl.col("user").cast(pl.Decimal(10, 2))),
        "order.parquet": new.select("price", "city", "user").with_columns(extra=pl.lit([1, 2])),
    }  # fmt: skip

    def scores(path: Path) -> list[float]:
        told = recsys("predict", run, "--data", path, "--out", tmp_path / "scores.parquet")
        assert "0.00% of their values are unknown" in told
        found: list[float] = pl.read_parquet(tmp_path / "scores.parquet")["score"].to_list()
        return found

    expected = scores(write(new, tmp_path / "new.parquet"))
    assert len(set(expected)) > 50
    for name, frame in others.items():
        assert scores(write(frame, tmp_path / name)) == expected, name


def test_missing_and_unknown_values_are_told(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    frame = logs().with_columns(
        pl.when(pl.col("ts") % 100 == 3).then(float("nan")).when(pl.col("ts") % 100 == 4).then(1e300)
        .otherwise(pl.col("price")).alias("price"),
        pl.when(pl.col("ts") >= 10**9 + 360).then(pl.col("user") + 1000).otherwise(pl.col("user")).alias("user"),
    )  # fmt: skip
    path = write(frame, tmp_path / "logs.parquet")
    told = recsys("train", recipe, "data.bad_rows.non_finite=map", "--out", tmp_path / "run")
    nulls = frame["city"].null_count()
    train = frame["city"][:320].null_count()
    assert (
        f"train: {train} missing values in column 'city', 8 not finite values in column 'price' (see data.json)" in told
    )
    assert "test: " in told
    assert "40 unknown values in column 'user'" in told
    told = recsys("predict", tmp_path / "run", "--data", path, "--out", tmp_path / "scores.csv")
    assert "3.33% of their values are unknown" in told
    assert f"{nulls} missing values in column 'city', 40 unknown values in column 'user', 8 not finite" in told


def test_rows_set_aside_are_told_and_kept_in_the_run(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    price = pl.when(pl.col("ts") % 100 == 3).then(float("nan")).otherwise(pl.col("price"))
    path = write(logs().with_columns(price.alias("price")), tmp_path / "logs.parquet")
    wrong = [i for i, ts in enumerate(logs()["ts"], 1) if ts % 100 == 3]
    told = recsys("train", recipe, "data.bad_rows.budget=0.05", "--out", tmp_path / "run")
    assert "rows set aside" in told
    assert "(see data.json and quarantine.parquet)" in told
    aside = pl.read_parquet(tmp_path / "run" / "quarantine.parquet")
    assert aside.rows() == [(str(path), row, "price", "NaN", "non_finite", "is not finite as float32") for row in wrong]
    splits = json.loads((tmp_path / "run" / "data.json").read_text())["splits"].values()
    assert sum(split["aside"] for split in splits) == len(wrong)
    assert sum(split["rows"] for split in splits) == len(logs()) - len(wrong)


def test_numbers_too_large_for_the_model_are_missing(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    recsys("train", recipe, "--out", tmp_path / "run")
    for value in (1e300, float("inf"), None):
        write(logs().with_columns(price=pl.lit(value, pl.Float64)), tmp_path / "new.parquet")
        recsys("predict", tmp_path / "run", "--data", tmp_path / "new.parquet", "--out", tmp_path / f"{value}.csv")
    assert pl.read_csv(tmp_path / "1e+300.csv").equals(pl.read_csv(tmp_path / "None.csv"))
    assert pl.read_csv(tmp_path / "inf.csv").equals(pl.read_csv(tmp_path / "None.csv"))


def test_scores_are_not_written_under_a_kept_name(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    recsys("train", recipe, "--out", tmp_path / "run")
    new = write(logs().with_columns(score=pl.lit(1)), tmp_path / "new.parquet")
    with pytest.raises(SystemExit, match=r"error: --keep score: the scores have that name"):
        recsys("predict", tmp_path / "run", "--data", new, "--out", tmp_path / "s.csv", "--keep", "score")


def test_several_files_are_one_data_set(recsys: Command, tmp_path: Path) -> None:
    first, second = write(logs()[:150], tmp_path / "a.csv"), write(logs()[150:], tmp_path / "b.csv")
    block = recsys("schema", "infer", first, second)
    assert "400 rows" in block
    (tmp_path / "recipe.yaml").write_text(block + MODEL)
    told = recsys("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert "train 320, valid 40, test 40 rows" in told


def test_a_damaged_file_is_named_while_it_is_read(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    rows = pl.concat([logs()] * 30)
    parts = [write(rows, tmp_path / f"part-{i}.parquet") for i in (0, 1)]
    recipe.write_text(
        recipe.read_text().replace("logs.parquet", "part-*.parquet").replace("by: time, column: ts", "by: hash")
    )
    raw = bytearray(parts[1].read_bytes())
    raw[4:200] = bytes(196)
    parts[1].write_bytes(raw)
    with pytest.raises(SystemExit, match=rf"^error: {parts[1]}: cannot be read"):
        recsys("train", recipe, "--out", tmp_path / "run")


def test_a_table_in_a_pipe_is_not_broken_into_lines(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    every = ["auc", "logloss", "gauc", "ece", "normalized_entropy", "pr_auc"]
    recipe.write_text(recipe.read_text().replace("  context:", "  context:\n    group: user"))
    stages = f"stages=[{{use: fit}}, {{use: evaluate, metrics: [{', '.join(every)}]}}]"
    told = recsys("train", recipe, stages, "--out", tmp_path / "run")
    header = next(line for line in told.splitlines() if "split" in line)
    assert all(name in header for name in every)
    assert any("A click log with planted structure and known click" in line for line in recsys("list").splitlines())


@pytest.mark.parametrize("place", ["run", "cache", "scores"])
def test_a_place_that_cannot_be_written_is_one_line(
    recsys: Command, tmp_path: Path, recipe: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file where a folder is needed: stops any user, root too.
    (tmp_path / "file").touch()
    inside: Any = tmp_path / "file" / "x"
    if place == "scores":
        recsys("train", recipe, "--out", tmp_path / "run")
    command: tuple[Any, ...] = ("train", recipe, "--out", inside if place == "run" else tmp_path / "run")
    if place == "cache":
        monkeypatch.setenv("RECSYS_CACHE", str(inside))
    elif place == "scores":
        command = ("predict", tmp_path / "run", "--data", tmp_path / "logs.parquet", "--out", inside / "s.csv")
    with pytest.raises(SystemExit, match=r"^error: .*file.*: (Not a directory|File exists)\n$"):
        recsys(*command)


def test_json_is_the_only_line_of_stdout(recsys: Command, tmp_path: Path, recipe: Path) -> None:
    out = recsys("train", recipe, "--out", tmp_path / "run", "--json").splitlines()
    assert len(out) == 1
    assert json.loads(out[0])["run"] == str(tmp_path / "run")
    out = recsys("evaluate", tmp_path / "run", "--json").splitlines()
    assert len(out) == 1
    assert set(json.loads(out[0])["metrics"]) == {"valid", "test"}


def test_a_run_finds_its_data_again_and_goes_on_where_they_were_moved(
    recsys: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    block = recsys("schema", "infer", write(logs(), tmp_path / "a" / "logs.parquet"))
    (tmp_path / "recipe.yaml").write_text(block.replace(str(tmp_path / "a") + "/", "") + MODEL)
    monkeypatch.chdir(tmp_path)
    recsys("train", "recipe.yaml", "--data-root", "a", "--out", "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert json.loads(recsys("evaluate", "../run", "--json"))["metrics"] == told
    # Another cache, another folder, another time of the file: the same data all the same.
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "b").mkdir()
    write(pl.read_parquet(tmp_path / "a" / "logs.parquet"), tmp_path / "b" / "logs.parquet")
    (tmp_path / "a" / "logs.parquet").unlink()
    assert "3-export: done before" in recsys("train", "--resume", "../run", "--data-root", "../b")
    write(logs().with_columns(city=pl.lit("x")), tmp_path / "b" / "logs.parquet")
    with pytest.raises(SystemExit, match="the data has changed since the run was started"):
        recsys("train", "--resume", "../run", "--data-root", "../b", "--allow-drift")


def test_fields_keep_the_order_of_the_recipe_whatever_the_cache_holds(
    recsys: Command, tmp_path: Path, recipe: Path
) -> None:
    names = {}
    for order in ("[user, city]", "[city, user]"):
        run = tmp_path / order
        recsys("train", recipe, f"data.categorical={order}", "--out", run)
        bodies = [json.loads((run / folder / "encoder" / "encoder.json").read_text()) for folder in ("", "export")]
        names[order] = [list(body["config"]["categorical"]) for body in bodies]
        data = json.loads((run / "recipe.json").read_text())["data"]
        assert list(data) == ["source", "split", "label", "categorical", "numeric", "context"]
    assert names == {"[user, city]": [["user", "city"]] * 2, "[city, user]": [["city", "user"]] * 2}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_absent_logger_names_its_extra(
    recsys: Command, tmp_path: Path, recipe: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent:
        def __init__(self, **_: Any) -> None:
            raise ModuleNotFoundError(f"{name} is not there")

    monkeypatch.setattr(f"lightning.pytorch.loggers.{'WandbLogger' if name == 'wandb' else 'MLFlowLogger'}", Absent)
    with pytest.raises(SystemExit, match=rf"'{name}' needs the package '{name}'; install it with .*recsys\[{name}\]"):
        recsys("train", recipe, f"train.logger={name}", "--out", tmp_path / "run")


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow (or mlflow-skinny) is not installed")
def test_curves_go_to_mlflow_or_the_error_says_how(
    recsys: Command, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'curves'}")
    out = recsys("train", recipe, "train.logger=mlflow", "--out", tmp_path / "run")
    told = [float(number) for number in re.findall(r"valid/auc ([0-9.]+)", out)]
    (path,) = (tmp_path / "curves").glob("*/*/metrics/valid/auc")
    curve = [float(line.split()[1]) for line in path.read_text().splitlines()]
    assert told
    assert curve == pytest.approx(told, abs=1e-5)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing-of-this-kind://here")
    with pytest.raises(SystemExit, match=r"train.logger: mlflow: .*MLFLOW_TRACKING_URI says where curves go"):
        recsys("train", recipe, "train.logger=mlflow", "--out", tmp_path / "other")
