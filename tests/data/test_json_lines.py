"""NDJSON in blocks, against the json module."""

import json
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from recsys.data.json_lines import json_blocks, json_schema
from recsys.data.quarantine import ROW
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "i": st.none() | st.integers(-(2**63), 2**63 - 1),
        "f": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "t": st.none() | TEXT,
        "l": st.none() | st.lists(TEXT, max_size=3),
        "b": st.none() | st.booleans(),
    },
)
TYPES = {"i": pl.Int64(), "f": pl.Float64(), "t": pl.String(), "l": pl.List(pl.String), "b": pl.Boolean()}
BROKEN = {
    b"nope": "json_object",
    b"[1]": "json_object",
    b"5": "json_object",
    b'"x"': "json_object",
    b"{": "json_object",
    b'{"i": 1} {"i": 2}': "json_object",
    b'{"i": NaN}': "json_object",
    b'{"t": "\xff"}': "encoding",
    b'{"t": "\0"}': "encoding",
    b'{"t": "\\u0000"}': "encoding",
    b'{"t": "\\ud800x"}': "encoding",
    b'\xef\xbb\xbf{"i": 1}': "encoding",
}
LINE = st.one_of(
    RECORD.map(lambda r: json.dumps(r).encode()),
    RECORD.map(lambda r: json.dumps(r, ensure_ascii=False).encode()),
    st.sampled_from(list(BROKEN)),
    st.sampled_from([b"", b"  ", b"\t"]),
)


def read(text: bytes, rows: int, schema: dict[str, pl.DataType] | None = None) -> tuple[list[Any], list[int], Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.ndjson"
        path.write_bytes(text)
        types = json_schema(str(path)) if schema is None else schema
        found = list(json_blocks(str(path), types, list(types), rows))
    values = [row for block in found for row in block.frame.drop(ROW).to_dicts()]
    bad = [row for block in found for row in block.bad.iter_rows(named=True)]
    assert all(b.records == len(b.frame) + len(b.bad) for b in found)
    return values, [n for b in found for n in b.frame[ROW]], bad


@given(st.lists(LINE, max_size=25), st.sampled_from([b"\n", b"\r\n"]), st.sampled_from([1, 3, 1000]), st.booleans())
@example([b"{}", b'{"i": 1}', b'\xef\xbb\xbf{"i": 1}'], b"\n", 1, True)
def test_lines_are_those_of_the_json_module(lines: list[bytes], end: bytes, rows: int, mark: bool) -> None:
    mark = mark or lines[:1] == [b'\xef\xbb\xbf{"i": 1}']  # at the very beginning it is the file's
    values, numbers, bad = read(b"\xef\xbb\xbf" * mark + end.join([*lines, b""]), rows, TYPES)
    given_lines = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    records = [(row, number, line) for row, (number, line) in enumerate(given_lines, 1)]
    assert numbers == [row for row, _, line in records if line not in BROKEN]
    expected = [json.loads(line) for _, _, line in records if line not in BROKEN]
    assert values == [{name: record.get(name) for name in TYPES} for record in expected]
    assert [(b["row"], b["rule"], b["problem"].split(":")[0]) for b in bad] == [
        (row, BROKEN[line], f"line {number}") for row, number, line in records if line in BROKEN
    ]


@given(st.lists(RECORD, min_size=1, max_size=25), st.sampled_from(sorted(BROKEN)))
def test_types_are_those_of_all_lines(records: list[dict[str, Any]], broken: bytes) -> None:
    values, _, bad = read(b"\n".join([*(json.dumps(r).encode() for r in records), broken]), 7)
    assert [{k: v for k, v in row.items() if v is not None} for row in values] == [
        {k: v for k, v in r.items() if v is not None} for r in records
    ]
    assert len(bad) == 1


@pytest.mark.parametrize("rows", [1, 2, 1000])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["1", "2", "[1]", "true"], r"3, column 'a': expected a number.* as in other rows, found \[1\]"),
        (["1", "2", "3", "true"], r"4, column 'a': expected a number.* as in other rows, found true"),
        (["true", "null", "7"], r"1, column 'a': expected a number \(Int64\) as in other rows, found true"),
        (['"x"', "null", '["y"]'], r"3, column 'a': expected text.* as in other rows, found \[\"y\"\]"),
        (["[1]", '{"b": 1}'], r"2, column 'a': expected a list.* as in other rows, found {\"b\": 1}"),
    ],
)
def test_another_type_late_in_the_file_names_the_row(tmp_path: Path, values: list[str], told: str, rows: int) -> None:
    path = tmp_path / "log.ndjson"
    path.write_text("".join(f'{{"a": {value}}}\n' for value in values))
    with pytest.raises(DataError, match=rf"^{path}, row {told}"):
        list(Files(DataRoot((tmp_path,)), train="log.ndjson").blocks("train", ["a"], rows))


def test_text_beside_numbers_is_text_and_wide_numbers_stay_exact(tmp_path: Path) -> None:
    path = tmp_path / "log.ndjson"
    path.write_text('{"a": 1, "b": 1}\n{"a": "x", "b": 18446744073709551615}\n{"a": 2.5, "b": -1}\n')
    assert dict(json_schema(str(path))) == {"a": pl.String, "b": pl.Int128}
    values, _, _ = read(path.read_bytes(), 1)
    assert values == [{"a": "1", "b": 1}, {"a": "x", "b": 2**64 - 1}, {"a": "2.5", "b": -1}]


def test_the_lazy_frame_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "log.ndjson"
    path.write_text('{"a": 1}\n\nnope\n')
    with pytest.raises(DataError, match=rf"^{path}, line 3: not JSON: .*: 'nope'$"):
        Files(DataRoot((tmp_path,)), train="log.ndjson").scan("train")
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}')
    assert Files(DataRoot((tmp_path,)), train="log.ndjson").scan("train").collect()["a"].to_list() == [1, 2]
