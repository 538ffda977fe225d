"""The fixtures that every environment with recsys and pytest has."""

from __future__ import annotations

import subprocess
import sys

import torch

from recsys.api import FIRST_ID, Batch, EncodedSchema, Fields, Table
from recsys.testing import samples


def test_loading_it_imports_nothing_heavy() -> None:
    heavy = ("torch", "polars", "pydantic", "numpy", "rich", "typer")
    code = f"import sys, recsys.testing.pytest_plugin; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_batch_fits_the_schema(recsys_batch: Batch, recsys_schema: EncodedSchema) -> None:
    rows = torch.tensor([field.rows for field in recsys_schema.fields])
    assert recsys_batch.ids.shape == (6, len(recsys_schema.fields))
    assert bool(((recsys_batch.ids >= 0) & (recsys_batch.ids < rows)).all())
    assert recsys_batch.values is not None
    for f, field in enumerate(recsys_schema.fields):
        assert bool((recsys_batch.values[:, f] == 1).all()) != field.numeric
    events, length = recsys_batch.history["clicks"]
    real = torch.arange(events.shape[1]) < length[:, None]
    assert bool((events[real] >= FIRST_ID).all())
    assert bool((events[~real] == 0).all())
    assert set(recsys_batch.context) == set(recsys_schema.context)
    assert set(recsys_batch.label["label"].tolist()) == {0.0, 1.0}


def test_a_table_reads_the_batch(recsys_batch: Batch, recsys_schema: EncodedSchema) -> None:
    table = Table(recsys_schema, dim=2, init_std=1.0)
    doubled = table(recsys_batch.ids, 2 * recsys_batch.values)
    torch.testing.assert_close(doubled[:, -1], 2 * table(recsys_batch.ids, recsys_batch.values)[:, -1])


def test_the_fields_are_those_of_the_vectors(recsys_fields: Fields) -> None:
    assert samples.vectors(4).shape == (4, len(recsys_fields), recsys_fields.dim)
    ids = samples.ids(500, recsys_fields)
    assert ids.amax(0).tolist() == [rows - 1 for rows in recsys_fields.rows]
    assert torch.equal(samples.vectors(4), samples.vectors(4))
