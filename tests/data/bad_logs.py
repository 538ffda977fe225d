"""What the tests of bad input share: small logs, and a way to write them."""

from collections.abc import Callable
from pathlib import Path

import polars as pl

from recsys.data.prepare import Prepared

Prepare = Callable[..., Prepared]


GOOD = pl.DataFrame(
    {"user": [1, 2, 1, 3], "city": ["a", "b", None, "a"], "price": [0.5, 1.0, 2.0, None], "y": [0, 1, 1, 0]}
)


def csv(tmp_path: Path, text: str, name: str = "train.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


HEADER = "user,city,price,y\n"


ROWS = "1,a,0.5,0\n2,b,1.0,1\n"
