"""What the tests of bundles share."""

from __future__ import annotations

import shutil
from pathlib import Path

import made
import pytest


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
