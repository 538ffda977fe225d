"""What every test stands on: one thread per process, a cache of its own, and where the real data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read by torch when it is first imported, here and in the processes that tests start: the tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep encoded data of the tests out of the user's cache, and out of the next run's."""
    os.environ["RECSYS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def recsys_data() -> Path:
    """The folder that the data sets of the recipes lie in; without it the test is skipped."""
    folder = os.environ.get("RECSYS_DATA")
    if not folder:
        pytest.skip("RECSYS_DATA is not set")
    return Path(folder)
