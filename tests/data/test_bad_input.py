"""What people feed a trainer by mistake: a clear error with file, column and row, or a count. One test per case."""

import gzip
import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.contracts import NULL_ID, UNKNOWN_ID
from recsys.data.prepare import Prepared, prepare
from recsys.data.schema import DataConfig
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError

Prepare = Callable[..., Prepared]
GOOD = pl.DataFrame(
    {"user": [1, 2, 1, 3], "city": ["a", "b", None, "a"], "price": [0.5, 1.0, 2.0, None], "y": [0, 1, 1, 0]}
)


@pytest.fixture
def run(tmp_path: Path) -> Prepare:
    """Prepare files of the temporary folder with a small data block."""

    def do(options: dict[str, Any] | None = None, **block: Any) -> Prepared:
        chosen = {"label": "y", "categorical": ["user", "city"], "numeric": ["price"], **block}
        config = DataConfig.model_validate({"source": {}, **chosen})
        return prepare(config, Files(DataRoot((tmp_path,)), **(options or {"train": "train.csv"})), tmp_path / "cache")

    return do


def csv(tmp_path: Path, text: str, name: str = "train.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


HEADER = "user,city,price,y\n"
ROWS = "1,a,0.5,0\n2,b,1.0,1\n"


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


def test_b14_altered_encoded_data_is_not_used_again(run: Prepare, tmp_path: Path) -> None:
    csv(tmp_path, HEADER + ROWS)
    file = run().folder / "train" / "records-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[5] ^= 16
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"records-00000\.bin: altered after it was written"):
        run()


@pytest.mark.parametrize(("row", "found"), [("1,a,0.5", 3), ("1,a,0.5,0,7,7", 6), ("", 1)])
def test_b15_too_few_or_too_many_fields(run: Prepare, tmp_path: Path, row: str, found: int) -> None:
    path = csv(tmp_path, HEADER + '1,"a,b ""c""",0.5,0\n' + ROWS + row + "\n" + ROWS)
    what = f"line 5: {found} field{'' if found == 1 else 's'} where the header has 4"
    with pytest.raises(DataError, match=f"^{path}, {what}: '{row}'"):
        run(bad_rows={"fields": "error"})
    with pytest.raises(
        DataError, match=rf"1 of 6 rows \(16\.67%\) break a rule.*\n  {path}, row 4: '{row}', {what} \(1 "
    ):
        run()
    prepared = run(bad_rows={"budget": 0.2})
    assert len(prepared.splits["train"]) == 5
    assert prepared.report.splits["train"].aside == 1
    assert "train: 5 rows, 1 set aside; label" in str(prepared.report)
    aside = pl.read_parquet(prepared.folder / "quarantine.parquet")
    assert aside.rows() == [(str(path), 4, None, row, "fields", what)]


def test_b16_an_unclosed_quote_names_the_line(run: Prepare, tmp_path: Path) -> None:
    path = csv(tmp_path, HEADER + ROWS + '1,"a,0.5,0\n' + ROWS)
    with pytest.raises(DataError, match=f"^{path}, line 4: a quote is not closed"):
        run()


def test_b16_quoted_line_breaks_are_no_error(run: Prepare, tmp_path: Path) -> None:
    csv(tmp_path, HEADER + ROWS + '1,"a\nb",0.5,0\n' + ROWS)
    assert len(run().splits["train"]) == 5


@pytest.mark.parametrize(
    ("raw", "shown"), [(b"1,caf\xe9,0.5,0", "1,caf\\xe9,0.5,0"), (b"1,a\0,0.5,0", "1,a\\x00,0.5,0")]
)
def test_b17_lines_that_are_not_utf8_or_have_a_nul(run: Prepare, tmp_path: Path, raw: bytes, shown: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes((HEADER + ROWS).encode() + raw + b"\n" + ROWS.encode())
    with pytest.raises(DataError, match=rf"^{path}, line 4: not UTF-8, or a NUL character: "):
        run(bad_rows={"encoding": "error"})
    prepared = run(bad_rows={"budget": 0.2})
    assert len(prepared.splits["train"]) == 4
    aside = pl.read_parquet(prepared.folder / "quarantine.parquet")
    assert aside.rows() == [(str(path), 3, None, shown, "encoding", "line 4: not UTF-8, or a NUL character")]


def test_b17_a_byte_order_mark_is_no_part_of_the_first_name(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + (HEADER + ROWS).encode())
    assert len(run().splits["train"]) == 2


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (gzip.compress((HEADER + ROWS).encode()), "compressed by gzip; unpack it first"),
        ((HEADER + ROWS).encode("utf-16"), "text in UTF-16; save the file as UTF-8"),
        ((HEADER + ROWS).replace("\n", "\r").encode(), "lines end with carriage returns only"),
    ],
    ids=["gzip", "utf-16", "carriage returns"],
)
def test_b17_b18_other_bytes_under_the_name_of_text(run: Prepare, tmp_path: Path, raw: bytes, told: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f"^{path}: {told}"):
        run()


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_b18_another_separator_is_suggested(run: Prepare, tmp_path: Path, separator: str) -> None:
    path = csv(tmp_path, (HEADER + ROWS).replace(",", separator))
    with pytest.raises(DataError) as caught:
        run()
    assert str(caught.value) == (f"{path}: 1 column found with separator ',', did you mean separator {separator!r}?")
    assert len(run({"train": "train.csv", "separator": separator}).splits["train"]) == 2


def test_b18_windows_line_ends(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes((HEADER + ROWS).replace("\n", "\r\n").encode() + b"3,a,1.0,0\n")
    assert run().splits["train"].labels("label").tolist() == [0, 1, 0]


def test_b18_a_header_in_the_middle(run: Prepare, tmp_path: Path) -> None:
    path = csv(tmp_path, HEADER + ROWS + HEADER + ROWS)
    with pytest.raises(DataError, match=f"^{path}, line 4: the header again: 'user,city,price,y'"):
        run(bad_rows={"fields": "error"})
    assert len(run(bad_rows={"budget": 0.2}).splits["train"]) == 4


@pytest.mark.parametrize("bad", [2, -1, 0.5, None, "yes", "nan"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_b19_labels_other_than_0_and_1(run: Prepare, tmp_path: Path, bad: Any, suffix: str) -> None:
    kind = pl.String if isinstance(bad, str) else pl.Float64
    labels = ["0", "1", bad, "1"] if isinstance(bad, str) else [0, 1, bad, 1]
    frame = GOOD.with_columns(pl.Series("y", labels, dtype=kind))
    path = tmp_path / f"train.{suffix}"
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    with pytest.raises(DataError) as caught:
        run({"train": path.name})
    text = suffix == "csv" or isinstance(bad, str)
    shown = "null" if bad is None else repr(str(frame["y"][2])) if text else str(frame["y"][2])
    assert str(caught.value).startswith(f"{path}, row 3, label column 'y': expected 0 or 1, found {shown} (1 rows")


def test_b19_all_distinct_bad_labels_are_listed(run: Prepare, tmp_path: Path) -> None:
    GOOD.with_columns(pl.Series("y", [3, 1, 2, 3])).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"row 1, label column 'y': expected 0 or 1, found 3, 2 \(3 rows"):
        run({"train": "train.parquet"})


@pytest.mark.parametrize("label", [0, 1])
def test_b20_one_class_is_an_error_in_train_and_a_warning_elsewhere(run: Prepare, tmp_path: Path, label: int) -> None:
    same = GOOD.with_columns(y=pl.lit(label))
    GOOD.write_parquet(tmp_path / "good.parquet")
    same.write_parquet(tmp_path / "same.parquet")
    with pytest.raises(DataError, match=rf"label 'label' \(column 'y'\) is {label} in all 4 rows"):
        run({"train": "same.parquet"})
    report = run({"train": "good.parquet", "valid": "same.parquet"}).report
    assert report.warnings == [
        f"valid: label 'label' is {label} in all 4 rows; AUC and other rank metrics are undefined there"
    ]


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


def flipped(path: Path) -> None:
    """Change one byte in the midst of a file, its size and its time kept."""
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"bb500")] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


LONG = pl.DataFrame(
    {
        "user": [f"{'b' * 2}{n}" for n in range(1000)],
        "city": ["a", "b"] * 500,
        "price": [float(n) for n in range(1000)],
        "y": [0, 1] * 500,
    }
)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_b14_an_altered_file_is_found_by_a_list_of_sha256(run: Prepare, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train.{suffix}"
    LONG.write_parquet(path, compression="uncompressed") if suffix == "parquet" else LONG.write_csv(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  other.csv\n{digest.upper()} *{path.name}\n")
    source = {"train": path.name, "sha256": "SHA256SUMS"}
    assert len(run(source).splits["train"]) == 1000
    flipped(path)
    with pytest.raises(DataError, match=rf"^{path}: altered: its sha256 is [0-9a-f]{{64}}, in {tmp_path}/SHA256SUMS"):
        run(source, batch_rows=500)
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  other.csv\n")
    with pytest.raises(DataError, match=rf"^{path}: not listed in {tmp_path}/SHA256SUMS$"):
        run(source, batch_rows=500)
    (tmp_path / "SHA256SUMS").write_text("train.csv\n")
    with pytest.raises(DataError, match=r"SHA256SUMS, line 1: expected `sha256  file` as sha256sum prints it"):
        run(source, batch_rows=500)


def test_b14_rotten_pages_are_found_by_their_checksums(run: Prepare, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "train.parquet"
    parquet.write_table(LONG.to_arrow(), path, write_page_checksum=True, compression="none")
    source = {"train": "train.parquet", "page_checksums": True}
    assert len(run(source).splits["train"]) == 1000
    flipped(path)
    with pytest.raises(DataError, match=rf"^{path}: altered or damaged: .*CRC"):
        run(source, batch_rows=500)
    assert len(run({"train": "train.parquet"}, batch_rows=500).splits["train"]) == 1000, "without it nothing is seen"
    LONG.write_parquet(path)
    with pytest.raises(DataError, match=rf"^{path}: the pages of column 'user' have no checksums"):
        run(source)


def test_b14_page_checksums_name_the_extra(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LONG.write_parquet(tmp_path / "train.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"page_checksums needs the package pyarrow: pip install 'recsys\[checksums\]'"):
        run({"train": "train.parquet", "page_checksums": True})


def test_b17_a_byte_order_mark_in_the_midst_is_set_aside(run: Prepare, tmp_path: Path) -> None:
    """As in files that were joined by `cat`."""
    path = tmp_path / "train.csv"
    path.write_bytes((HEADER + ROWS).encode() + b"\xef\xbb\xbf" + (HEADER + ROWS).encode())
    with pytest.raises(DataError, match=rf"^{path}, line 4: a byte order mark in the midst: "):
        run(bad_rows={"encoding": "error"})
    prepared = run(bad_rows={"budget": 0.2})
    assert len(prepared.splits["train"]) == 4
    aside = pl.read_parquet(prepared.folder / "quarantine.parquet")
    assert aside.select("row", "value", "rule").rows() == [(3, "\\ufeffuser,city,price,y", "encoding")]


def test_b17_parquet_with_bytes_that_are_not_utf8_is_named(run: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    LONG.write_parquet(path, compression="uncompressed", use_pyarrow=False)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"bb500", b"b\xff500"))
    with pytest.raises(DataError, match=rf"^{path}: cannot be read: "):
        run({"train": "train.parquet"})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_b19_labels_over_the_budget_are_listed(run: Prepare, tmp_path: Path, suffix: str) -> None:
    frame = GOOD.with_columns(pl.Series("y", [0, 1, 3, 2]))
    frame = pl.concat([frame, GOOD.with_columns(y=pl.lit(3, pl.Int64)).head(2)])
    path = tmp_path / f"train.{suffix}"
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    with pytest.raises(DataError) as caught:
        run({"train": path.name}, bad_rows={"label": "quarantine"})
    assert "4 of 6 rows (66.67%) break a rule" in str(caught.value)
    assert f"{path}, row 3, column 'y': '3', expected 0 or 1 (4 such rows; values '3', '2'; rule label)" in str(
        caught.value
    )


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


def test_b14_strict_tells_files_apart_that_differ_in_one_byte(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    pl.concat([LONG] * 40).with_columns(pl.int_range(100_000, 100_000 + pl.len()).alias("n")).write_csv(path)
    config = DataConfig.model_validate({"source": {}, "label": "y", "categorical": ["user", "n"]})

    def prints(strict: bool = False) -> str:
        source = Files(DataRoot((tmp_path,)), train="train.csv")
        return prepare(config, source, tmp_path / "c", strict=strict).fingerprint

    first = prints()
    assert prints(strict=True) == first
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[raw.index(b",110123\n") + 1 + 5] = ord("4")  # far from the samples, which are every 15th of the file
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prints() == first
    second = prints(strict=True)
    assert second != first
    assert prints() == second, "what was found by every byte is used from then on"
    assert prints(strict=True) == second
