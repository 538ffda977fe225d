"""What every test stands on: one thread per process, patience with slow machines, a cache, and the real data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read by torch when it is first imported, here and in the processes that tests start: the tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test is about time: on a busy machine an example may take any while. Where CI is set, the examples are the same
# every time, so that a change is judged by what it does; anywhere else they are new ones, and find more.
settings.register_profile(
    "recsys", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("recsys")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep encoded data of the tests out of the user's cache, and out of the next run's."""
    os.environ["RECSYS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seldom_bundles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the bundle out of what the stage `export` writes in this process, but for tests marked `bundle`."""
    export = sys.modules.get("recsys.deploy.export")
    if export is not None and request.node.get_closest_marker("bundle") is None:
        monkeypatch.setattr(export, "NEEDED", ("absent_in_tests",))


@pytest.fixture(scope="session")
def recsys_data() -> Path:
    """The folder that the data sets of the recipes lie in; without it the test is skipped."""
    folder = os.environ.get("RECSYS_DATA")
    if not folder:
        pytest.skip("RECSYS_DATA is not set")
    return Path(folder)
