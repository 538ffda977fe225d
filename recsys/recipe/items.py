"""From a run to an index of its items, for `recsys export --index`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import polars as pl
import torch
from rich.console import Console
from torch.nn import functional

from recsys.contracts import Batch
from recsys.data.encode import Encoder
from recsys.data.vocabulary import Vocabulary
from recsys.deploy.golden import batch_of, frame_of
from recsys.errors import ExportError, did_you_mean, listing
from recsys.plugin.registry import Registry
from recsys.recipe.build import load_exported

_READERS = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".ndjson": pl.read_ndjson}


def export_index(
    run: Path,
    registry: Registry,
    out: Path,
    fields: Sequence[str],
    *,
    catalogue: Path | None,
    task: str | None,
    console: Console,
) -> str:
    """Write the index of a run's items.

    Args:
        run: folder of a run with the folders `export` and `bundle`.
        registry: of components.
        out: folder to be made.
        fields: the item's; the first is its id.
        catalogue: file with a row for each item, and a column for each of the fields; by default all ids that
            training saw, where there is one field.
        task: whose logit; the first by default.
        console: for messages.

    Returns:
        What was written, in a line.

    Raises:
        ExportError: the model is no factor model, or a field or the catalogue is wrong.
    """
    from recsys.deploy.bundle import open_bundle
    from recsys.deploy.graph import onnx_of
    from recsys.deploy.index import write_index
    from recsys.deploy.sides import two_sides

    bundle = open_bundle(run / "bundle")
    _, loaded, _ = load_exported(run / "export", registry, console)
    encoder, model = loaded.encoder, loaded.model.cpu().eval()
    rows = catalogue_rows(encoder, fields, catalogue)
    items = rows.get_column(fields[0]).to_list()
    sides = two_sides(model, fields, encoded(encoder, rows), task or model.schema.tasks[0])
    user = onnx_of(sides.user, model.schema, ["vector"])
    write_index(out, bundle.id, fields, items, sides.items.numpy(), user, sides.gap)
    return (
        f"{len(items):,} items with {sides.items.shape[1]} numbers each; they score as the model within {sides.gap:.1g}"
    )


def encoded(encoder: Encoder, rows: pl.DataFrame) -> Batch:
    """Return rows of some columns as one batch; what is not there is missing, or an empty list."""
    empty = frame_of(encoder, []).schema
    columns = [
        pl.col(name).cast(kind) if name in rows.columns else pl.lit(None, kind).alias(name)
        for name, kind in empty.items()
    ]
    batches = [batch_of(encoder, block) for block in encoder.transform(rows.select(columns).lazy(), labels=False)]
    values = [batch.values for batch in batches if batch.values is not None]
    history = {}
    for h in encoder.schema.histories:
        longest = max(batch.history[h.name][0].shape[1] for batch in batches)
        events = [functional.pad(e, (0, 0, 0, longest - e.shape[1])) for e, _ in (b.history[h.name] for b in batches)]
        history[h.name] = (torch.cat(events), torch.cat([batch.history[h.name][1] for batch in batches]))
    return Batch(torch.cat([batch.ids for batch in batches]), torch.cat(values) if values else None, history)


def catalogue_rows(encoder: Encoder, fields: Sequence[str], catalogue: Path | None) -> pl.DataFrame:
    """Return a row for each item, with a column for each of its fields, of the type that the logs have.

    Raises:
        ExportError: a field or the catalogue is wrong.
    """
    known = [*encoder.config.categorical, *encoder.config.numeric, *encoder.config.multi_valued]
    for name in fields:
        if name not in known:
            raise ExportError(f"--items: no field {name!r}.{did_you_mean(name, known)} Fields: {listing(known)}")
    if fields[0] not in encoder.config.categorical:
        kind = "a number" if fields[0] in encoder.config.numeric else "a list"
        raise ExportError(f"--items: {fields[0]} is {kind}; the first field is the item's id")
    if catalogue is None:
        return _vocabulary(encoder, fields)
    read: Any = _READERS.get(catalogue.suffix)
    if read is None:
        raise ExportError(f"--catalogue {catalogue}: expected a file {listing(_READERS)}")
    rows = read(catalogue)
    for name in fields:
        if name not in rows.columns:
            raise ExportError(f"{catalogue}: no column {name!r}.{did_you_mean(name, rows.columns)}")
    wanted = frame_of(encoder, []).schema
    for name in fields:
        found, given = rows.schema[name], rows.get_column(name)
        told = f"{catalogue}: column {name!r} is {found}, not {wanted[name]} as in the logs"
        if found.is_float() and wanted[name].is_integer() and bool((given != given.floor()).any()):
            raise ExportError(f"{told}, and some of its numbers are not whole")
        try:
            rows = rows.with_columns(given.cast(wanted[name]))
        except pl.exceptions.PolarsError as error:
            raise ExportError(told) from error
    twice = rows.height - rows.get_column(fields[0]).n_unique()
    if twice:
        raise ExportError(f"{catalogue}: {twice} rows have the {fields[0]} of another row; an item has one")
    return cast("pl.DataFrame", rows.select(fields))


def _vocabulary(encoder: Encoder, fields: Sequence[str]) -> pl.DataFrame:
    lookup = encoder.lookup(fields[0])
    if len(fields) > 1:
        raise ExportError(
            f"{listing(fields)}: which of them belong together? Give --catalogue FILE, a row for each item"
        )
    if not isinstance(lookup, Vocabulary):
        raise ExportError(
            f"{fields[0]} is hashed, its values are not known; give --catalogue FILE, a row for each item"
        )
    return pl.DataFrame({fields[0]: lookup.values})
