"""Files, lines and labels that are not what they should be: errors with an address, or rows set aside."""

import gzip
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from bad_logs import GOOD, HEADER, ROWS, Prepare, csv

from recsys.data.prepare import prepare
from recsys.data.schema import DataConfig
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError


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
