"""Fixtures of the tests of the conformance kit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from recsys.plugin.hooks import KINDS
from recsys.testing import Contract, ContractError, contract


@pytest.fixture
def only() -> Callable[..., Contract]:
    """Return a contract with no other checks than the named ones, which keeps planted faults quick."""

    def build(*names: str) -> Contract:
        every = {name for kind in KINDS for name in contract.checks(kind)}
        return contract.without(*(every - {"options"} - set(names)))

    return build


@pytest.fixture
def caught(only: Callable[..., Contract]) -> Callable[[Any, Any, set[str]], None]:
    """Return a check that a planted fault fails just the named checks, and is told by name with a hint for each."""

    def check(kind: Any, factory: Any, failed: set[str]) -> None:
        with pytest.raises(ContractError) as raised:
            only(*failed)(kind, factory)
        assert set(raised.value.failed) == failed
        assert factory.__name__ in str(raised.value)
        assert str(raised.value).count("fix: ") == len(failed)

    return check


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `sound` and `fault` the values of the module's own `SOUND` and `FAULTS`."""
    if "sound" in metafunc.fixturenames:
        sound = metafunc.module.SOUND
        metafunc.parametrize("sound", sound, ids=[kind for kind, _ in sound])
    if "fault" in metafunc.fixturenames:
        faults = metafunc.module.FAULTS
        metafunc.parametrize("fault", faults, ids=[factory.__name__ for _, factory, _ in faults])
