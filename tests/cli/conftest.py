"""What the tests of the commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from recsys import cli


@pytest.fixture
def recsys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in this process and return its stdout; a failed one raises SystemExit with its stderr."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["recsys", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        if stopped.value.code not in (0, None):
            raise SystemExit(captured.err)
        return captured.out

    return run
