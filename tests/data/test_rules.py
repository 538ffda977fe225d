"""Every rule of raw rows against a slow reference: which rows break it, under each policy, format and block size."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.encode import Encoder
from recsys.data.quarantine import Quarantine
from recsys.data.reading import source_rows
from recsys.data.report import SplitReport
from recsys.data.rules import READING_RULES, Rule, Screen
from recsys.data.schema import BadRows, DataConfig
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError

LARGEST = float(np.finfo(np.float32).max)
TEXTS = ["1", " 2.5 ", "-3e2", "0", "NA", "x", "", "1,5", "nan", "inf", "-inf", "1e39", "-", "1e400", None]
FLOATS = [1.0, -2.5, 0.0, None, math.nan, math.inf, -math.inf, 1e39, -1e39, LARGEST]
WHOLES = [1.0, 2.0, None, math.nan, 2.5, -0.5, 2.0**53, 2.0**53 - 1, 2.0**53 - 2, -(2.0**53), math.inf, 1e20, -7.0]
LABELS = [0.0, 1.0, 2.0, -1.0, 0.5, None, math.nan, math.inf]
WEIGHTS = [0.0, 1.0, -1.0, 0.5, None, math.nan, math.inf]
WIDE = [1, -5, None, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**20]
LISTS = [[1, 2], [3], [], None, [1, 2, 3]]


def number(value: Any) -> float | None:
    """Return what a value reads as, None if it is no number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value.strip())
    except ValueError:
        return None


def is_text_wrong(row: dict[str, Any]) -> bool:
    return row["x"] is not None and row["x"] != "NA" and number(row["x"]) is None


def is_infinite(row: dict[str, Any]) -> bool:
    value = number(row["x"]) if row["x"] != "NA" else None
    return value is not None and not abs(value) <= LARGEST


def is_fraction(row: dict[str, Any]) -> bool:
    value = row["x"]
    if value is None or math.isnan(value):
        return False
    return math.isinf(value) or value != math.floor(value) or abs(value) > 2**53 - 1


def is_rounded(row: dict[str, Any]) -> bool:
    return row["x"] is not None and (row["x"] != math.floor(row["x"]) or abs(row["x"]) > 2**24 - 1)


CASES: dict[str, tuple[Rule, list[Any], pl.DataType, dict[str, Any], Callable[[dict[str, Any]], bool], tuple[str, ...]]]
CASES = {
    "number": (
        "number", TEXTS, pl.String(), {"numeric": {"x": {"null_values": ["NA"]}}}, is_text_wrong,
        ("error", "quarantine", "map"),
    ),
    "non_finite text": (
        "non_finite", [t for t in TEXTS if t is None or number(t) is not None], pl.String(),
        {"numeric": {"x": {"null_values": ["NA"]}}}, is_infinite, ("error", "quarantine", "map"),
    ),
    "non_finite": (
        "non_finite", FLOATS, pl.Float64(), {"numeric": ["x"]}, is_infinite, ("error", "quarantine", "map")
    ),
    "whole": ("whole", WHOLES, pl.Float64(), {"categorical": ["u", "x"]}, is_fraction, ("error", "quarantine")),
    "whole float32": (
        "whole", [1.0, 2.5, None, 2.0**24, 2.0**24 - 1, 2.0**24 + 2, -(2.0**24)], pl.Float32(),
        {"categorical": ["u", "x"]}, is_rounded, ("error", "quarantine"),
    ),
    "whole wide": (
        "whole", WIDE, pl.Int128(), {"categorical": ["u", "x"]},
        lambda r: r["x"] is not None and not -(2**63) <= r["x"] < 2**63, ("error", "quarantine"),
    ),
    "whole in lists": (
        "whole", [[1.0], [2.0, 2.5], [], None, [math.nan, None], [2.0**53]], pl.List(pl.Float64),
        {"multi_valued": ["x"]},
        lambda r: any(v is not None and not math.isnan(v) and is_fraction({"x": v}) for v in r["x"] or []),
        ("error", "quarantine"),
    ),
    "label": ("label", LABELS, pl.Float64(), {"label": "x"}, lambda r: r["x"] not in (0, 1), ("error", "quarantine")),
    "label text": (
        "label", ["0", "1", " 1", "yes", "", None, "2"], pl.String(), {"label": "x"},
        lambda r: number(r["x"]) not in (0, 1), ("error", "quarantine"),
    ),
    "context weight": (
        "context", WEIGHTS, pl.Float64(), {"context": {"weight": "x"}},
        lambda r: r["x"] is None or not 0 <= r["x"] < math.inf, ("error", "quarantine"),
    ),
    "context propensity": (
        "context", WEIGHTS, pl.Float64(), {"context": {"propensity": "x"}},
        lambda r: r["x"] is None or not 0 < r["x"] <= 1, ("error", "quarantine"),
    ),
    "context delay": (
        "context", WEIGHTS, pl.Float64(), {"context": {"delay": "x"}},
        lambda r: r["x"] is None or not 0 <= r["x"] < math.inf, ("error", "quarantine"),
    ),
    "context attribute": (
        "context", [-1.0, 0.0, 3.0, None, -2.0, 1.5, math.nan], pl.Float64(), {"context": {"attribute": "x"}},
        lambda r: r["x"] not in (-1, 0, 3), ("error", "quarantine"),
    ),
    "context observed": (
        "context", [0, 1, None, 2, -1], pl.Int64(), {"context": {"observed": "x"}},
        lambda r: r["x"] not in (0, 1), ("error", "quarantine"),
    ),
    "context uniform": (
        "context", [True, False, None], pl.Boolean(), {"context": {"uniform": "x"}},
        lambda r: r["x"] is None, ("error", "quarantine"),
    ),
    "context position": (
        "context", [1.0, None, 1.5, math.nan, math.inf, -3.0, 2.0**63, -(2.0**63)], pl.Float64(),
        {"context": {"position": "x"}},
        lambda r: r["x"] is None or not abs(r["x"]) < 2**63 or r["x"] != math.floor(r["x"]), ("error", "quarantine"),
    ),
    "context group": (
        "context", ["a", None, ""], pl.String(), {"context": {"group": "x"}}, lambda r: r["x"] is None,
        ("error", "quarantine"),
    ),
    "events": (
        "events", LISTS, pl.List(pl.Int64),
        {"multi_valued": [], "sequences": {"past": {"columns": {"u": "us", "v": "x"}}}, "categorical": ["u", "v"]},
        lambda r: len(r["us"] or []) != len(r["x"] or []), ("error", "quarantine"),
    ),
}  # fmt: skip


def frame_of(values: list[Any], dtype: pl.DataType) -> pl.DataFrame:
    rows = len(values)
    return pl.DataFrame(
        {
            "u": [n % 3 for n in range(rows)],
            "v": [n % 2 for n in range(rows)],
            "us": [[1, 2] if n % 4 else [3] for n in range(rows)],
            "y": [n % 2 for n in range(rows)],
            "x": pl.Series(values, dtype=dtype),
        }
    )


@contextmanager
def files(frame: pl.DataFrame, suffix: str, cut: int) -> Iterator[tuple[Files, list[str]]]:
    """Write rows to two files."""
    with tempfile.TemporaryDirectory() as name:
        parts = []
        for number, part in enumerate((frame[:cut], frame[cut:])):
            if len(part) or not number:
                path = Path(name) / f"{number}.{suffix}"
                match suffix:
                    case "csv":
                        part.drop("us").write_csv(path)
                    case "arrow":
                        part.write_ipc(path)
                    case _:
                        part.write_parquet(path)
                parts.append(str(path))
        yield Files(DataRoot((Path(name),)), path=tuple(parts)), parts


def suffixes(dtype: pl.DataType) -> list[str]:
    if isinstance(dtype, pl.List):
        return ["parquet", "arrow"]
    return ["csv", "parquet"] if dtype == pl.String else ["arrow"] if dtype == pl.Int128 else ["parquet", "arrow"]


def compare(name: str, data: st.DataObject) -> None:
    """Write rows, apply a rule, and compare what is refused, set aside and kept with the reference."""
    rule, values, dtype, block, is_wrong, policies = CASES[name]
    suffix = data.draw(st.sampled_from(suffixes(dtype)))
    if suffix == "csv":  # a file of text has no empty values beside missing ones
        values = [v for v in values if v != ""]
    drawn = data.draw(st.lists(st.sampled_from(values), min_size=2, max_size=24))
    cut = data.draw(st.integers(1, len(drawn)))
    policy = data.draw(st.sampled_from(policies))
    frame = frame_of(drawn, dtype)
    wrong = [n for n, row in enumerate(frame.iter_rows(named=True)) if is_wrong(row)]
    config = DataConfig.model_validate(
        {
            "source": {},
            "label": "y",
            "categorical": ["u"],
            **block,
            "bad_rows": {"budget": 1, "non_finite": "map", rule: policy},
        }
    )
    with files(frame, suffix, cut) as (source, paths):

        def where(n: int) -> tuple[str, int]:
            return (paths[0], n + 1) if n < cut else (paths[1], n - cut + 1)

        rows = source_rows(source, "all", "the logs")
        quarantine = Quarantine(config.bad_rows, "the logs")
        screen = Screen.of(config, rows.schema, "the logs", quarantine=quarantine)
        kept = []

        def clean() -> None:
            for raw in rows.blocks(config.columns(), data.draw(st.integers(1, len(drawn)), label="block")):
                for row in screen.clean(raw).iter_rows(named=True):
                    kept.append((raw.file, row["__row"], str(row["x"])))

        if wrong and policy == "error":
            file, row = where(wrong[0])
            with pytest.raises(DataError) as caught:
                clean()
            assert str(caught.value).startswith(f"{file}, row {row}")
            assert "'x'" in str(caught.value)
            return
        clean()
        aside = wrong if policy == "quarantine" else []
        left = [n for n in range(len(drawn)) if n not in aside]
        assert kept == [(*where(n), str(frame["x"].to_list()[n])) for n in left]
        found = quarantine.found
        assert found.select("file", "row").rows() == [where(n) for n in aside]
        assert set(found["rule"]) <= {rule}
        assert set(found["column"]) <= {"x"}
        assert (quarantine.rows, quarantine.seen) == (len(aside), len(drawn))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25)
@given(data=st.data())
def test_a_rule_is_broken_by_the_rows_of_the_reference(name: str, data: st.DataObject) -> None:
    compare(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=1000)
@given(data=st.data())
def test_a_thousand_cases_of_each_rule(name: str, data: st.DataObject) -> None:
    compare(name, data)


@settings(max_examples=30)
@given(drawn=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=12))
def test_values_that_are_mapped_are_missing_and_counted(drawn: list[str | None]) -> None:
    block = {"source": {}, "label": "y", "categorical": ["u"], "numeric": {"x": {"null_values": ["NA"]}}}
    config = DataConfig.model_validate({**block, "bad_rows": {"number": "map", "non_finite": "map"}})
    encoder = Encoder.fit(frame_of(["1", "2"], pl.String()).lazy(), config)
    report = SplitReport()
    blocks = list(encoder.transform(frame_of(drawn, pl.String()).lazy(), report=report))
    encoded = np.concatenate([b.values["x"] for b in blocks])
    rows = [{"x": value} for value in drawn]
    bad = [is_text_wrong(row) or is_infinite(row) for row in rows]
    missing = [row["x"] in (None, "NA") for row in rows]
    assert np.isnan(encoded).tolist() == [b or m for b, m in zip(bad, missing, strict=True)]
    counts = report.columns["x"]
    assert counts.null == sum(missing)
    assert counts.unreadable == sum(map(is_text_wrong, rows))
    assert counts.non_finite == sum(map(is_infinite, rows))


def test_every_rule_is_an_option_and_is_tested() -> None:
    assert {*get_args(Rule), *READING_RULES, "budget"} == set(BadRows.model_fields)
    assert {case[0] for case in CASES.values()} == set(get_args(Rule))
    for name, (rule, _, _, _, _, policies) in CASES.items():
        kinds = get_args(BadRows.model_fields[rule].annotation)
        assert set(policies) == set(kinds), name


def test_the_readme_has_every_rule() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for name, field in BadRows.model_fields.items():
        if name != "budget":
            kinds = ", ".join(f"`{kind}`" for kind in get_args(field.annotation))
            assert f"| `{name}` | {field.description} | `{field.default}` | {kinds} |" in readme
