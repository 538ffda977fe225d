"""Reading files: formats, globs, folders, side tables, and where files are looked for."""

from pathlib import Path

import polars as pl
import pytest

from recsys.data.quarantine import ROW
from recsys.data.reading import Blocked
from recsys.data.schema import DatasetNote
from recsys.data.sources import DataRoot, Files, MissingSplit
from recsys.errors import DataError

FRAME = pl.DataFrame({"user": [1, 2, 3], "city": ["a", None, "ü"], "y": [0, 1, 0]})


def write(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writers = {
        ".parquet": frame.write_parquet,
        ".csv": frame.write_csv,
        ".tsv": lambda p: frame.write_csv(p, separator="\t"),
        ".ndjson": frame.write_ndjson,
        ".arrow": frame.write_ipc,
    }
    writers[path.suffix](path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".ndjson", ".arrow"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    write(FRAME, tmp_path / f"rows{suffix}")
    found = Files(DataRoot((tmp_path,)), train=f"rows{suffix}").scan("train").collect()
    expected = FRAME.cast(pl.String) if suffix in (".csv", ".tsv") else FRAME
    assert found.equals(expected)


def test_the_format_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "part-0").write_text("user|y\n1|0\n")
    source = Files(DataRoot((tmp_path,)), train="part-0", format="csv", separator="|")
    assert source.scan("train").collect().row(0) == ("1", "0")
    with pytest.raises(DataError, match="cannot tell the format from 'a name without extension'; set `format`"):
        Files(DataRoot((tmp_path,)), train="part-0").scan("train")


def test_globs_folders_and_lists_are_read_in_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        write(FRAME.with_columns(pl.lit(i).alias("part")), tmp_path / "logs" / f"{i}.parquet")
    (tmp_path / "logs" / "_SUCCESS").touch()
    (tmp_path / "logs" / ".hidden.parquet").touch()
    for given in ("logs", "logs/*.parquet", ("logs/0.parquet", "logs/[12].parquet")):
        found = Files(DataRoot((tmp_path,)), path=given).scan("all").collect()
        assert found["part"].to_list() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert found["user"].to_list() == [1, 2, 3] * 3


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_hive_folders_are_columns(tmp_path: Path, suffix: str) -> None:
    for day in (3, 4):
        write(FRAME, tmp_path / "logs" / f"day={day}" / "country=de" / f"rows{suffix}")
    found = Files(DataRoot((tmp_path,)), path="logs").scan("all").collect()
    assert found["day"].to_list() == [3, 3, 3, 4, 4, 4]
    assert found["country"].unique().to_list() == ["de"]
    assert "day" not in Files(DataRoot((tmp_path,)), path="logs", hive=False).scan("all").collect().columns


def test_roots_are_tried_in_order(tmp_path: Path) -> None:
    write(FRAME, tmp_path / "second" / "a.parquet")
    write(FRAME, tmp_path / "third" / "a.parquet")
    root = DataRoot((tmp_path / "first", tmp_path / "second", tmp_path / "third"))
    assert Files(root, train="a.parquet").files("train") == (str(tmp_path / "second" / "a.parquet"),)
    assert root.find(str(tmp_path / "third" / "a.parquet")) == [str(tmp_path / "third" / "a.parquet")]


def test_what_is_not_found_says_where_to_get_it(tmp_path: Path) -> None:
    note = DatasetNote(name="frappe", where="https://example.org/frappe (research only)", columns=("user", "item"))
    with pytest.raises(DataError) as caught:
        Files(DataRoot((tmp_path / "a", tmp_path / "b"), note), train="frappe/train.parquet").scan("train")
    assert str(caught.value) == (
        "no such file or folder: 'frappe/train.parquet'. Looked at:"
        f"\n  {tmp_path}/a/frappe/train.parquet\n  {tmp_path}/b/frappe/train.parquet"
        "\nThe data set 'frappe' is obtained from https://example.org/frappe (research only)."
        "\nIt must have the columns user, item."
        "\nPass --data-root FOLDER or set RECSYS_DATA to the folder that holds it."
    )


def test_object_store_paths_are_left_alone() -> None:
    for path in ("s3://bucket/*.parquet", "hf://datasets/a/b.parquet", "https://example.org/a.csv"):
        assert DataRoot(()).find(path) == [path]


def test_splits_that_are_not_given(tmp_path: Path) -> None:
    write(FRAME, tmp_path / "a.parquet")
    with pytest.raises(MissingSplit, match="no 'valid' split; the recipe gives train"):
        Files(DataRoot((tmp_path,)), train="a.parquet").scan("valid")
    with pytest.raises(DataError, match="give `train`"):
        Files(DataRoot((tmp_path,)), valid="a.parquet")
    with pytest.raises(DataError, match=r"`path` .* excludes"):
        Files(DataRoot((tmp_path,)), path="a.parquet", train="a.parquet")


def test_side_tables_are_joined_in_the_order_of_the_rows(tmp_path: Path) -> None:
    logs = pl.DataFrame({"item": [3, 1, 9, 1, None], "user": [1, 2, 1, 2, 1], "y": [0, 1, 0, 1, 0]})
    write(logs, tmp_path / "logs.csv")
    write(pl.DataFrame({"item": [1, 2, 3], "genre": ["x", "y", "z"]}), tmp_path / "items.parquet")
    write(pl.DataFrame({"user": [1, 2], "age": [30, 40]}), tmp_path / "users.csv")
    source = Files(
        DataRoot((tmp_path,)),
        path="logs.csv",
        join=({"path": "items.parquet", "on": "item"}, {"path": "users.csv", "on": ["user"]}),
    )
    found = source.scan("all").collect()
    assert found["item"].to_list() == ["3", "1", "9", "1", None]
    assert found["genre"].to_list() == ["z", "x", None, "x", None]
    assert found["age"].to_list() == ["30", "40", "30", "40", "30"]
    source.require("all", ("genre", "age", "y"))


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (pl.DataFrame({"user": [1, 2, 2], "age": [1, 2, 3]}), r"side\.parquet: 2 rows for user=2; .* one row per key"),
        (pl.DataFrame({"usr": [1], "age": [1]}), r"side\.parquet: no column 'user' to join on. Did you mean 'usr'"),
        (pl.DataFrame({"user": [1], "city": ["q"]}), r"column 'city' is in the logs too"),
    ],
)
def test_side_tables_that_do_not_fit(tmp_path: Path, side: pl.DataFrame, message: str) -> None:
    write(FRAME, tmp_path / "logs.parquet")
    write(side, tmp_path / "side.parquet")
    with pytest.raises(DataError, match=message):
        Files(DataRoot((tmp_path,)), path="logs.parquet", join=({"path": "side.parquet", "on": "user"},)).scan("all")


def test_blocks_know_file_and_row(tmp_path: Path) -> None:
    write(FRAME, tmp_path / "a.parquet")
    write(FRAME.with_columns(user=pl.Series([7, 8, 9])), tmp_path / "b.parquet")
    write(pl.DataFrame({"user": [8], "age": [99]}), tmp_path / "users.parquet")
    source = Files(
        DataRoot((tmp_path,)), path=("a.parquet", "b.parquet"), join=({"path": "users.parquet", "on": "user"},)
    )
    assert isinstance(source, Blocked)
    found = [
        (Path(block.file or "").name, row, age, block.end)
        for block in source.blocks("all", ["age"], 2)
        for row, age in block.frame.select(ROW, "age").rows()
    ]
    ends = [2, 2, 3, 5, 5, 6]
    ages = [None, None, None, None, 99, None]
    files = ["a.parquet"] * 3 + ["b.parquet"] * 3
    assert found == list(zip(files, [1, 2, 3] * 2, ages, ends, strict=True))


def test_identity_follows_the_files(tmp_path: Path) -> None:
    write(FRAME, tmp_path / "a.parquet")
    source = Files(DataRoot((tmp_path,)), train="a.parquet")
    before = source.identity()
    assert before == Files(DataRoot((tmp_path,)), train="a.parquet").identity()
    write(FRAME.head(2), tmp_path / "a.parquet")
    assert source.identity() != before
