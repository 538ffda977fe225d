"""Text files in blocks, against the csv module."""

import csv
import io
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recsys.data.quarantine import ROW
from recsys.data.text import text_blocks
from recsys.errors import DataError

NAMES = ["a", "b", "c"]
VALUE = st.one_of(
    st.sampled_from(["", "x", '"', 'say "hi"', "1,5", "two\nlines", "\n", "end\r\n", "ä€", "\x01", " ", "'", "a;b"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=6),
)
RECORDS = st.lists(st.tuples(VALUE, VALUE, VALUE), max_size=30)


def written(records: list[tuple[str, ...]], separator: str, end: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([tuple(NAMES), *records])
    return text.getvalue()


def read(text: bytes, separator: str, rows: int) -> tuple[list[tuple[str, ...]], list[int], pl.DataFrame]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv"
        path.write_bytes(text)
        found = list(text_blocks(str(path), separator, NAMES, rows))
    values = [row for block in found for row in block.frame.drop(ROW).fill_null("").rows()]
    return values, [n for b in found for n in b.frame[ROW]], pl.concat([b.bad for b in found] or [pl.DataFrame()])


@settings(deadline=None, max_examples=150)
@given(RECORDS, st.sampled_from([",", "\t", ";"]), st.sampled_from(["\n", "\r\n"]), st.sampled_from([1, 3, 1000]))
@example([("a\nb", "", ""), ("", "", "")], ",", "\n", 1)
def test_records_are_those_of_the_csv_module(
    records: list[tuple[str, ...]], separator: str, end: str, rows: int
) -> None:
    text = written(records, separator, end)
    assert list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))[1:] == [list(r) for r in records]
    kept = [(i, r) for i, r in enumerate(records, 1) if list(r) != NAMES]
    values, numbers, bad = read(text.encode(), separator, rows)
    assert values == [r for _, r in kept]
    assert numbers == [i for i, _ in kept]
    assert len(bad) == len(records) - len(kept)


BROKEN = [b"1", b"1,2", b"1,2,3,4", b"", b"a,b,c", b"\xff,1,2", b"1,\0,2", b'1,"2,3"']


@settings(deadline=None, max_examples=100)
@given(st.lists(st.one_of(st.sampled_from(BROKEN), st.just(b'1,"2",3')), max_size=40), st.sampled_from([1, 7, 100]))
def test_what_cannot_be_read_is_set_aside_with_its_number(lines: list[bytes], rows: int) -> None:
    values, numbers, bad = read(b"\n".join([b"a,b,c", *lines]) + b"\n", ",", rows)
    good = [i for i, line in enumerate(lines, 1) if line not in BROKEN]
    assert numbers == good
    assert values == [("1", "2", "3")] * len(good)
    wrong = [i for i, line in enumerate(lines, 1) if line in BROKEN]
    if wrong:
        assert bad["row"].to_list() == wrong
        rules = ["encoding" if b"\xff" in lines[i - 1] or b"\0" in lines[i - 1] else "fields" for i in wrong]
        assert bad["rule"].to_list() == rules
        assert [p.split(":")[0] for p in bad["problem"]] == [f"line {i + 1}" for i in wrong]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_a_quote_in_a_value_that_is_not_quoted_is_set_aside(rows: int) -> None:
    values, numbers, bad = read(b'a,b,c\n5" pipe,1,2\n"q",1,2\nx,"6\n7","8"\nx,y,9"\n1,2,3\n', ",", rows)
    assert values == [("q", "1", "2"), ("x", "6\n7", "8"), ("1", "2", "3")]
    assert numbers == [2, 3, 5]
    assert bad.select("row", "value", "problem").rows() == [
        (1, '5" pipe,1,2', "line 2: a quote in a value that is not quoted"),
        (4, 'x,y,9"', "line 6: a quote in a value that is not quoted"),
    ]


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_an_unclosed_quote_names_the_line_where_its_record_begins(rows: int) -> None:
    with pytest.raises(DataError, match="line 3: a quote is not closed"):
        read(b'a,b,c\n1,2,3\n"4\n5",6,"7\n8,9,10\n11,12,13\n', ",", rows)
