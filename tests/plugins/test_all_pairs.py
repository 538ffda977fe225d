"""All pairs: each exactly once, what was observed with its values, and nothing of the valid or test pairs leaks."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from recsys.api import DataError, DataRoot
from recsys.testing import contract
from recsys_all_pairs import AllPairs

LOG = pl.DataFrame(
    {
        "user": [1, 1, 2, 3, 3, 3],
        "item": ["a", "b", "a", "c", "a", "b"],
        "rating": [5, 2, 1, 4, 3, 2],
        "theta": [0.5] * 6,
    }
)
TEST = pl.DataFrame({"user": [1, 2], "item": ["c", "d"], "rating": [4, 1]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    LOG.write_parquet(tmp_path / "train.parquet")
    TEST.write_parquet(tmp_path / "test.parquet")
    every = list(product([1, 2, 3], "abcd"))
    pl.DataFrame(
        {"user": [u for u, _ in every], "item": [i for _, i in every], "theta": [0.01 * k for k in range(1, 13)]}
    ).write_parquet(tmp_path / "theta.parquet")
    pl.DataFrame({"user": [1, 2, 3], "city": ["x", "y", "x"]}).write_parquet(tmp_path / "users.parquet")
    pl.DataFrame({"item": list("abcd"), "city": ["p", "q", "p", "q"]}).write_parquet(tmp_path / "items.parquet")
    return tmp_path


def source(folder: Path, **options: Any) -> AllPairs:
    given: dict[str, Any] = {
        "train": "train.parquet",
        "test": "test.parquet",
        "pairs": {"path": "theta.parquet", "column": "theta"},
    } | options
    return AllPairs(DataRoot((folder,)), **given)


def test_contract(folder: Path) -> None:
    contract(
        "source",
        AllPairs,
        train=str(folder / "train.parquet"),
        test=str(folder / "test.parquet"),
        pairs={"path": str(folder / "theta.parquet"), "column": "theta"},
        valid=0.4,
    )


@pytest.mark.parametrize("valid", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("rows", ["all", "observed"])
def test_every_pair_once_and_the_splits_apart(folder: Path, valid: float, rows: str) -> None:
    made = source(folder, valid=valid, rows=rows)
    splits = {name: made.scan(name).collect() for name in made.splits()}
    kept = splits["valid"].rows() if valid else []
    log = {(u, i): r for u, i, r, _ in LOG.rows()}
    chosen = {(u, i) for u, i, *_ in kept}
    wanted = []
    for k, (user, item) in enumerate(product([1, 2, 3], "abcd"), 1):
        seen = (user, item) in log
        if (user, item) not in chosen and (seen or rows == "all"):
            wanted.append((user, item, log.get((user, item), 0), int(seen), pytest.approx(0.01 * k)))
    assert splits["train"].select("user", "item", "rating", "observed", "theta").rows() == wanted
    assert all(log[u, i] == r and o == 1 for u, i, r, o, _ in kept)
    assert splits["test"].select("user", "item", "rating", "observed").rows() == [(1, "c", 4, 1), (2, "d", 1, 1)]
    assert ("valid" in splits) == bool(valid)


def test_the_choice_of_valid_pairs_depends_on_the_seed_alone(folder: Path) -> None:
    def chosen(seed: int) -> list[Any]:
        return source(folder, valid=0.5, seed=seed).scan("valid").collect().rows()

    assert chosen(1) == chosen(1)
    assert len({str(chosen(seed)) for seed in range(8)}) > 3


def test_properties_are_joined_and_equal_names_told_apart(folder: Path) -> None:
    frame = source(folder, users="users.parquet", items="items.parquet").scan("train").collect()
    assert frame.filter(user=2, item="b").select("city", "item_city").row(0) == ("y", "q")


def test_what_is_wrong_is_named(folder: Path) -> None:
    pl.concat([LOG, LOG[:1]]).write_parquet(folder / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: the pair of user 1, item 'a' is there twice"):
        source(folder, train="twice.parquet").scan("train")
    with pytest.raises(DataError, match=r"test\.parquet: no column 'theta', which train\.parquet has"):
        source(folder, pairs=None).scan("train")
    pl.read_parquet(folder / "theta.parquet")[:-1].write_parquet(folder / "short.parquet")
    wanted = re.escape("short.parquet: nothing of user 3, item 'd', which train has (1 rows in all)")
    with pytest.raises(DataError, match=wanted):
        source(folder, pairs={"path": "short.parquet", "column": "theta"}).scan("train")
    with pytest.raises(DataError, match=r"no column 'usr'\. Columns: user, item"):
        source(folder, user="usr").scan("train")
    with pytest.raises(DataError, match="no 'valid' split; it gives train, test"):
        source(folder, valid=0.0).scan("valid")
