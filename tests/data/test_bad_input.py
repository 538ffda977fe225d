"""What people feed a trainer by mistake: a clear error with file, column and row, or a count. One test per case."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from bad_logs import GOOD, HEADER, ROWS, Prepare, csv

from recsys.contracts import NULL_ID, UNKNOWN_ID
from recsys.errors import DataError


def test_b1_b2_unseen_and_missing_values_are_two_counted_things(run: Prepare, tmp_path: Path) -> None:
    GOOD.write_parquet(tmp_path / "train.parquet")
    GOOD.with_columns(pl.Series("user", [9, 1, None, 8]), pl.lit(None, pl.Float64).alias("price")).write_parquet(
        tmp_path / "test.parquet"
    )
    prepared = run({"train": "train.parquet", "test": "test.parquet"})
    batch = prepared.splits["test"].gather(np.arange(4))
    known = int(prepared.splits["train"].gather(np.array([0])).ids[0, 0])
    assert batch.ids[:, 0].tolist() == [UNKNOWN_ID, known, NULL_ID, UNKNOWN_ID]
    assert batch.ids[:, 2].tolist() == [0, 0, 0, 0]
    assert batch.values is not None
    assert batch.values[:, 2].tolist() == [1, 1, 1, 1]
    counts = prepared.report.splits["test"].columns
    assert (counts["user"].unknown, counts["user"].null, counts["price"].null) == (2, 1, 4)
    assert "test user 1 (25.00%) 2 (50.00%) 0 (0.00%)" in " ".join(str(prepared.report).split())


@pytest.mark.parametrize("column", ["user", "city", "price"])
def test_b2_a_column_without_any_value_is_an_error(run: Prepare, tmp_path: Path, column: str) -> None:
    GOOD.with_columns(pl.lit(None, GOOD[column].dtype).alias(column)).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=rf"column '{column}' has no value in any of 4 rows; drop it"):
        run({"train": "train.parquet"})


def test_b3_numbers_that_are_not_finite_are_counted_and_missing_where_the_recipe_says_so(
    run: Prepare, tmp_path: Path
) -> None:
    csv(tmp_path, HEADER + ROWS + "1,a,NaN,1\n1,a,inf,0\n1,a,-inf,1\n1,a,,0\n")
    prepared = run(bad_rows={"non_finite": "map"})
    counts = prepared.report.splits["train"].columns["price"]
    assert (counts.null, counts.non_finite) == (1, 3)
    batch = prepared.splits["train"].gather(np.arange(6))
    assert batch.ids[:, 2].tolist() == [1, 1, 0, 0, 0, 0]
    assert batch.values is not None
    assert bool(batch.values.isfinite().all())
    assert prepared.encoder.numerics["price"].mean == pytest.approx(0.75)


@pytest.mark.parametrize("text", ["NA", "-", "abc"])
def test_b4_b5_a_text_in_a_number_column_names_file_row_and_value(run: Prepare, tmp_path: Path, text: str) -> None:
    path = csv(tmp_path, HEADER + ROWS * 100 + f"3,a,{text},1\n" + ROWS)
    with pytest.raises(DataError) as caught:
        run()
    assert str(caught.value).startswith(f"{path}, row 201, column 'price': '{text}' is no number.")
    assert f"null_values: ['{text}']" in str(caught.value)
    fixed = run(numeric={"price": {"null_values": [text]}})
    assert fixed.report.splits["train"].columns["price"].null == 1


def test_b5_the_second_file_is_named(run: Prepare, tmp_path: Path) -> None:
    csv(tmp_path, HEADER + ROWS, "part-1.csv")
    second = csv(tmp_path, HEADER + ROWS + "1,a,x1,0\n", "part-2.csv")
    with pytest.raises(DataError, match=f"^{second}, row 3, column 'price': 'x1'"):
        run({"train": "part-*.csv"})


def test_b7_a_missing_column_names_file_and_nearest_name(run: Prepare, tmp_path: Path) -> None:
    path = csv(tmp_path, "user,town,price,y\n" + ROWS)
    with pytest.raises(DataError) as caught:
        run(categorical=["user", "tovn"])
    assert str(caught.value) == (f"{path}: no column 'tovn'. Did you mean 'town'? Columns: user, town, price, y")


def test_b7_a_column_missing_from_one_of_the_files(run: Prepare, tmp_path: Path) -> None:
    GOOD.write_parquet(tmp_path / "a.parquet")
    GOOD.drop("city").write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: no column 'city'"):
        run({"train": "*.parquet"})


def test_b8_extra_columns_are_ignored_and_listed(run: Prepare, tmp_path: Path) -> None:
    GOOD.with_columns(extra=pl.lit(1)).write_parquet(tmp_path / "a.parquet")
    GOOD.write_parquet(tmp_path / "b.parquet")
    assert run({"train": "a.parquet"}).report.ignored == ("extra",)
    assert len(run({"train": ("a.parquet", "b.parquet")}).splits["train"]) == 8
    assert len(run({"train": ("b.parquet", "a.parquet")}).splits["train"]) == 8


def test_b9_a_repeated_column_name_gives_both_positions(run: Prepare, tmp_path: Path) -> None:
    path = csv(tmp_path, "user,city,price,user,y\n1,a,0.5,2,0\n")
    with pytest.raises(DataError, match=f"^{path}: column 'user' appears twice, at positions 1 and 4$"):
        run()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_b9_a_repeated_column_name_in_a_binary_file_is_named(run: Prepare, tmp_path: Path, suffix: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_arrays([arrow.array([1, 2])] * 2 + [arrow.array([0, 1])], names=["user", "user", "y"])
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        importlib.import_module("pyarrow.parquet").write_table(table, path)
    else:
        with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=f"^{path}: cannot be read: "):
        run({"train": path.name}, categorical=["user"], numeric=[])


def test_b10_columns_are_taken_by_name(run: Prepare, tmp_path: Path) -> None:
    GOOD.write_parquet(tmp_path / "a.parquet")
    GOOD.select("y", "price", "city", "user").write_parquet(tmp_path / "b.parquet")
    batch = run({"train": ("a.parquet", "b.parquet")}).splits["train"].gather(np.arange(8))
    assert batch.ids[:4].tolist() == batch.ids[4:].tolist()


def test_b11_numbers_of_different_width_are_upcast(run: Prepare, tmp_path: Path) -> None:
    GOOD.write_parquet(tmp_path / "a.parquet")
    GOOD.with_columns(pl.col("user").cast(pl.Int16), pl.col("price").cast(pl.Float32)).write_parquet(
        tmp_path / "b.parquet"
    )
    batch = run({"train": "*.parquet"}).splits["train"].gather(np.arange(8))
    assert batch.ids[:4].tolist() == batch.ids[4:].tolist()


def test_b11_text_and_numbers_mixed_lists_the_files_by_type(run: Prepare, tmp_path: Path) -> None:
    GOOD.write_parquet(tmp_path / "a.parquet")
    GOOD.with_columns(pl.col("user").cast(pl.String)).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError) as caught:
        run({"train": "*.parquet"})
    assert str(caught.value) == (
        "column 'user' has different types in different files:"
        f"\n  Int64: {tmp_path}/a.parquet\n  String: {tmp_path}/b.parquet\nCast it in one of them."
    )


@pytest.mark.parametrize("name", ["train.csv", "train.parquet", "train.ndjson", "train.arrow"])
def test_b12_a_zero_byte_file(run: Prepare, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"^0 rows in .*{name}: the file is empty \(0 bytes\)$"):
        run({"train": name})


def test_b12_a_header_without_rows(run: Prepare, tmp_path: Path) -> None:
    path = csv(tmp_path, HEADER)
    with pytest.raises(DataError, match=f"^0 rows in {path}$"):
        run()
    GOOD.head(0).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"^0 rows in .*train\.parquet$"):
        run({"train": "train.parquet"})


def test_b12_a_glob_that_matches_nothing(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^no file matches 'day-\*\.csv'. Looked at:\n  {tmp_path}/day-\*\.csv"):
        run({"train": "day-*.csv"})


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
def test_b13_a_truncated_parquet_file_is_named(run: Prepare, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "train.parquet"
    GOOD.write_parquet(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(DataError, match=f"^{path}: cannot be read: "):
        run({"train": "train.parquet"})


def test_fractional_ids_are_an_error(run: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    GOOD.with_columns(pl.Series("user", [1.0, 2.0, 2.5, 1.0])).write_parquet(path)
    with pytest.raises(DataError, match=rf"^{path}, row 3, column 'user': 2\.5 is no whole number"):
        run({"train": "train.parquet"})


def test_lists_of_different_length_in_one_sequence(run: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    GOOD.with_columns(
        pl.Series("users", [[1], [2], [1, 2], []]), pl.Series("cities", [["a"], ["b"], ["a"], []])
    ).write_parquet(path)
    with pytest.raises(DataError, match=rf"^{path}, row 3: 2 events in 'users' but 1 in 'cities'"):
        run({"train": "train.parquet"}, sequences={"past": {"columns": {"user": "users", "city": "cities"}}})


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("weight", [1.0, -1.0, 1.0, 1.0], r"row 2, context weight 'c': expected a finite number ≥ 0, found -1\.0"),
        ("weight", [1.0, 1.0, float("nan"), 1.0], r"row 3, context weight 'c': expected a finite number"),
        ("propensity", [0.5, 1.0, 0.0, 0.1], r"row 3, context propensity 'c': expected a number in \(0, 1\], found 0"),
        (
            "propensity",
            [0.5, 1e-50, 0.5, 0.1],
            r"row 2, context propensity 'c': expected a number in \(0, 1\], found 1",
        ),
        (
            "propensity",
            [0.5, None, 1.5, 0.1],
            r"row 2, context propensity 'c': expected a number in \(0, 1\], found null",
        ),
        ("delay", [0.5, 0.0, -1.0, 0.1], r"row 3, context delay 'c': expected a finite number ≥ 0, found -1\.0"),
        ("observed", [0, 1, 2, 1], r"row 3, context observed 'c': expected 0 or 1, found 2"),
        ("uniform", [0, 1, 1, None], r"row 4, context uniform 'c': expected 0 or 1, found null"),
        ("attribute", [-1, 0, -2, 1], r"row 3, context attribute 'c': expected a whole number ≥ -1, found -2"),
        ("position", [1.0, 1.5, 2.0, 3.0], r"row 2, context position 'c': expected a whole number, found 1\.5"),
        ("group", [1, 2, 3, None], r"row 4, context group 'c': expected a value, found null"),
    ],
)
def test_b33_context_outside_its_limits(
    run: Prepare, tmp_path: Path, name: str, values: list[Any], message: str
) -> None:
    GOOD.with_columns(pl.Series("c", values)).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message):
        run({"train": "train.parquet"}, context={name: "c"})


@pytest.mark.parametrize(
    ("values", "block", "message"),
    [
        ([[1], [2], [1], [3]], {"categorical": ["user"]}, "list it under multi_valued or sequences"),
        ([{"a": 1}] * 4, {"categorical": ["user"]}, "a categorical column holds integers, text"),
        ([[1], [2], [1], [3]], {"numeric": ["user"]}, "a numeric column holds numbers"),
        ([1, 2, 3, 4], {"multi_valued": ["user"]}, "expected a list column, or text with separators"),
    ],
)
def test_b34_types_that_do_not_fit(
    run: Prepare, tmp_path: Path, values: list[Any], block: dict[str, Any], message: str
) -> None:
    GOOD.with_columns(pl.Series("user", values)).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=f"column 'user' is .*{message}"):
        run({"train": "train.parquet"}, **{"categorical": ["city"], "numeric": [], **block})


def test_b5_b17_ndjson_lines_are_set_aside_and_types_that_change_are_an_error(run: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "train.ndjson"
    lines = ['{"user": 1, "city": "a", "price": 0.5, "y": 0}', '{"user": 2, "price": 1, "y": 1}']
    path.write_text("\n".join([*lines, '{"user": 1, "city"', "", *lines]))
    with pytest.raises(DataError, match=rf"^{path}, line 3: not JSON: .*: '{{\"user\": 1, \"city\"'"):
        run({"train": "train.ndjson"}, bad_rows={"json_object": "error"})
    prepared = run({"train": "train.ndjson"}, bad_rows={"budget": 0.2})
    assert len(prepared.splits["train"]) == 4
    aside = pl.read_parquet(prepared.folder / "quarantine.parquet")
    assert aside.select("file", "row", "value", "rule").rows() == [(str(path), 3, '{"user": 1, "city"', "json_object")]
    path.write_text("\n".join([*lines, '{"user": [1], "y": 0}', *lines]))
    with pytest.raises(DataError, match=rf"^{path}, row 3, column 'user': expected a number .*, found \[1\]"):
        run({"train": "train.ndjson"})
    path.write_text("\n".join([*lines, '{"user": 1, "price": "NA", "y": 0}', *lines]))
    with pytest.raises(DataError, match=rf"^{path}, row 3, column 'price': 'NA' is no number"):
        run({"train": "train.ndjson"})
    assert len(run({"train": "train.ndjson"}, numeric={"price": {"null_values": ["NA"]}}).splits["train"]) == 5


@pytest.mark.parametrize("strings", [True, False])
def test_b11_two_ndjson_files_of_different_types(run: Prepare, tmp_path: Path, strings: bool) -> None:
    GOOD.write_ndjson(tmp_path / "a.ndjson")
    GOOD.with_columns(pl.col("user").cast(pl.String if strings else pl.Float64)).write_ndjson(tmp_path / "b.ndjson")
    if strings:
        with pytest.raises(DataError, match=r"column 'user' has different types.*\n  Int64: .*a\.ndjson\n  String: "):
            run({"train": "*.ndjson"})
    else:
        batch = run({"train": "*.ndjson"}).splits["train"].gather(np.arange(8))
        assert batch.ids[:4].tolist() == batch.ids[4:].tolist()


def test_b11_signed_and_unsigned_ids_of_64_bits_stay_exact(run: Prepare, tmp_path: Path) -> None:
    ids = [2**62, 2**62 + 1, 2**62, 1]
    GOOD.with_columns(pl.Series("user", ids)).write_parquet(tmp_path / "a.parquet")
    GOOD.with_columns(pl.Series("user", ids, dtype=pl.UInt64)).write_parquet(tmp_path / "b.parquet")
    batch = run({"train": "*.parquet"}).splits["train"].gather(np.arange(8))
    assert batch.ids[:4].tolist() == batch.ids[4:].tolist()
    assert len(set(batch.ids[:, 0].tolist())) == 3
    wide = tmp_path / "b.parquet"
    GOOD.with_columns(pl.Series("user", [1, 2, 2**63, 3], dtype=pl.UInt64)).write_parquet(wide)
    with pytest.raises(DataError, match=rf"^{wide}, row 3, column 'user': {2**63} is no whole number"):
        run({"train": "*.parquet"})


def test_b25_null_events_are_missing_and_unseen_ones_unknown(run: Prepare, tmp_path: Path) -> None:
    past = pl.Series("past", [[1, None, 2], [], None, [3, 99]])
    GOOD.with_columns(past).write_parquet(tmp_path / "train.parquet")
    GOOD.with_columns(pl.Series("past", [[7, None, 1], [2], [], [0]])).write_parquet(tmp_path / "test.parquet")
    prepared = run({"train": "train.parquet", "test": "test.parquet"}, sequences={"h": {"columns": {"user": "past"}}})
    ids, length = prepared.splits["test"].gather(np.arange(4)).history["h"]
    known = prepared.encoder.lookups["user"].rows
    assert length.tolist() == [3, 1, 0, 1]
    assert ids[0, :2, 0].tolist() == [UNKNOWN_ID, NULL_ID]
    assert ids[3, 0, 0] == UNKNOWN_ID
    assert bool(((ids >= 0) & (ids < known)).all())
    assert 99 in prepared.encoder.lookups["user"].values.to_list(), "an event of the train split has an id of its own"


def test_b26_a_split_by_time_is_in_order_whatever_the_order_of_the_logs(run: Prepare, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    times = np.concatenate([rng.integers(10**9, 10**9 + 50, 196), [0, 10**9, 9_999_999_999, 10**9]])
    frame = pl.DataFrame({"user": times % 7, "city": ["a"] * 200, "price": 1.0, "ts": times, "y": times % 2})
    frame.sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "train.parquet")
    prepared = run({"path": "train.parquet"}, split={"by": "time", "column": "ts"}, context={"time": "ts"})
    spans = []
    for name in ("train", "valid", "test"):
        rows = prepared.splits[name]
        found = rows.gather(np.arange(len(rows))).context["time"]
        spans.append((int(found.min()), int(found.max())))
    assert spans[0][1] < spans[1][0] <= spans[1][1] < spans[2][0]
    assert sum(len(s) for s in prepared.splits.values()) == 200


def test_b33_weights_that_are_all_0_are_an_error(run: Prepare, tmp_path: Path) -> None:
    GOOD.with_columns(c=pl.lit(0.0)).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"the train split: context weight 'c' is 0 in all 4 rows"):
        run({"train": "train.parquet"}, context={"weight": "c"})
    GOOD.with_columns(pl.Series("c", [0.0, 0.0, 0.5, 0.0])).write_parquet(tmp_path / "train.parquet")
    assert len(run({"train": "train.parquet"}, context={"weight": "c"}).splits["train"]) == 4
