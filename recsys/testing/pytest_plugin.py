"""Fixtures for the tests of components, in every environment that has recsys and pytest.

pytest imports this module at each start, so it imports nothing heavy; torch comes with the first fixture used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from recsys.contracts import Batch, EncodedSchema, Fields


@pytest.fixture
def recsys_fields() -> Fields:
    """Three fields of different cardinality, D = 8: what a selector or an interaction is built with."""
    from recsys.testing.samples import fields

    return fields(3)


@pytest.fixture
def recsys_schema() -> EncodedSchema:
    """Two categorical fields, one numeric, one history and one task: what an embedding is built with."""
    from recsys.testing.samples import schema

    return schema()


@pytest.fixture
def recsys_batch() -> Batch:
    """Six rows of `recsys_schema`, the same at every call."""
    from recsys.testing.samples import batch

    return batch(6)
