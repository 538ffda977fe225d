"""Encoding that is broken off goes on where it was, to the same bytes; what cannot be gone on with is begun anew."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data import encode_pass, shard_files
from recsys.data.prepare import Prepared, prepare
from recsys.data.reading import RawBlock
from recsys.data.schema import DataConfig
from recsys.data.sources import DataRoot, Files
from recsys.errors import DataError

ROWS = 500


class Broken(BaseException):
    """Stands for the process being killed."""


class Counted(Files):
    """Files that note where their blocks are read from."""

    starts: list[int]

    def blocks(self, split: str, columns: Sequence[str], rows: int, start: int = 0) -> Iterator[RawBlock]:
        self.starts.append(start)
        return super().blocks(split, columns, rows, start)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, with a history, and bad rows in both."""
    folder = tmp_path_factory.mktemp("logs")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        price = rng.normal(size=ROWS)
        price[rng.integers(0, ROWS, 3)] = np.nan
        pl.DataFrame(
            {
                "c": rng.integers(0, 99, ROWS),
                "past": [rng.integers(0, 99, n).tolist() for n in rng.integers(0, 5, ROWS)],
                "price": price,
                "y": rng.integers(0, 2, ROWS),
            }
        ).write_parquet(folder / f"{name}.parquet")
    return folder


def config(**block: Any) -> DataConfig:
    base = {
        "source": {},
        "label": "y",
        "categorical": ["c"],
        "numeric": ["price"],
        "sequences": {"history": {"columns": {"c": "past"}, "max_length": 3}},
        "split": {"by": "hash", "valid": 0.2, "test": 0.1},
        "bad_rows": {"budget": 0.05},
        "batch_rows": 64,
        "shard_rows": 150,
    }
    return DataConfig.model_validate({**base, **block})


def source(logs: Path) -> Counted:
    found = Counted(DataRoot((logs,)), path="*.parquet")
    found.starts = []
    return found


def everything(prepared: Prepared) -> tuple[Any, ...]:
    aside = prepared.folder / encode_pass.QUARANTINE
    return prepared.fingerprint, prepared.report, pl.read_parquet(aside).rows() if aside.is_file() else None


def breaking_at(block: int) -> Any:
    """Return a progress that breaks off at a block of the encoding."""
    seen = 0

    def tell(what: str, rows: int) -> None:
        nonlocal seen
        if what.startswith("encode"):
            seen += 1
            if seen == block:
                raise Broken

    return tell


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 17), max_size=4), st.sampled_from([1, 3]))
def test_broken_off_encoding_goes_on_to_the_same_bytes(
    logs: Path, tmp_path_factory: pytest.TempPathFactory, breaks: list[int], save_every: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        expected = everything(prepare(config(), source(logs), folder / "whole"))
        clock = iter(range(10**6))
        patch.setattr(encode_pass.time, "monotonic", lambda: next(clock))
        patch.setattr(encode_pass, "SAVE_SECONDS", save_every - 0.5)
        for at in breaks:
            try:
                prepare(config(), source(logs), folder / "broken", progress=breaking_at(at))
            except Broken:
                continue
            break
        last = source(logs)
        assert everything(prepare(config(), last, folder / "broken")) == expected
        assert not list((folder / "broken").glob(".*"))


def test_what_is_encoded_is_not_read_again(logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_pass, "SAVE_SECONDS", -1.0)
    with pytest.raises(Broken):
        prepare(config(), source(logs), tmp_path, progress=breaking_at(11))
    again = source(logs)
    prepare(config(), again, tmp_path)
    # Blocks of 64 rows: eight of the first file (the last one shorter), two of the second are saved.
    assert again.starts == [ROWS + 2 * 64]


@pytest.mark.parametrize("harm", ["state", "records", "encoder", "quarantine"])
def test_what_cannot_be_gone_on_with_is_encoded_anew(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    expected = everything(prepare(config(), source(logs), tmp_path / "whole"))
    monkeypatch.setattr(encode_pass, "SAVE_SECONDS", -1.0)
    with pytest.raises(Broken):
        prepare(config(), source(logs), tmp_path / "broken", progress=breaking_at(11))
    (partial,) = (tmp_path / "broken").glob(".partial-*")
    if harm == "state":
        (partial / ".pass-all" / "state.json").write_text('{"end": 12')
    elif harm == "records":
        file = max((partial / "train").glob("records-*.bin"))
        raw = bytearray(file.read_bytes())
        raw[1] ^= 255
        file.write_bytes(raw)
    elif harm == "encoder":
        body = json.loads((partial / "encoder" / "encoder.json").read_text())
        (partial / "encoder" / "encoder.json").write_text(json.dumps({**body, "version": 0}))
    else:
        next(iter((partial / ".pass-all").glob("quarantine-*.parquet"))).write_bytes(b"PAR1")
    assert everything(prepare(config(), source(logs), tmp_path / "broken")) == expected


def test_a_full_disk_is_told_and_nothing_is_lost(logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = everything(prepare(config(), source(logs), tmp_path / "whole"))
    monkeypatch.setattr(encode_pass, "SAVE_SECONDS", -1.0)
    whole, calls = shard_files._File.write, 0

    def failing(self: Any, data: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_files._File, "write", failing)
        with pytest.raises(DataError, match=r"\.partial-\w+: cannot be written: No space left on device"):
            prepare(config(), source(logs), tmp_path / "full")
    again = source(logs)
    assert everything(prepare(config(), again, tmp_path / "full")) == expected
    assert again.starts[0] > 0
