"""Fixtures of the tests of the conformance kit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recsys.plugin.hooks import KINDS
from recsys.testing import Contract, contract


@pytest.fixture
def only() -> Callable[..., Contract]:
    """Return a contract with no other checks than the named ones, which keeps planted faults quick."""

    def build(*names: str) -> Contract:
        every = {name for kind in KINDS for name in contract.checks(kind)}
        return contract.without(*(every - {"options"} - set(names)))

    return build
