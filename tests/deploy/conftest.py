"""What the tests of bundles share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import made
import pytest
from serving import Server


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no test may change."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    made.write(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A bundle to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def server(whole: Path) -> Iterator[Server]:
    """A server of that bundle with its usual limits."""
    running = Server(whole)
    yield running
    status, errors = running.stop()
    assert "Traceback" not in errors, errors
    assert status in (0, -15)
