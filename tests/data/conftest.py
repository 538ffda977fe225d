"""Fixtures of the tests of the data path."""

from pathlib import Path
from typing import Any

import pytest
from bad_logs import Prepare

from recsys.data.prepare import Prepared, prepare
from recsys.data.schema import DataConfig
from recsys.data.sources import DataRoot, Files


@pytest.fixture
def run(tmp_path: Path) -> Prepare:
    """Prepare files of the temporary folder with a small data block."""

    def do(options: dict[str, Any] | None = None, **block: Any) -> Prepared:
        chosen = {"label": "y", "categorical": ["user", "city"], "numeric": ["price"], **block}
        config = DataConfig.model_validate({"source": {}, **chosen})
        return prepare(config, Files(DataRoot((tmp_path,)), **(options or {"train": "train.csv"})), tmp_path / "cache")

    return do
