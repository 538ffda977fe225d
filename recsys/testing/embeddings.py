"""What an embedding promises; see `recsys.contracts.Embedding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from recsys.contracts import EncodedSchema, Fields, Selection
from recsys.testing import modules, samples
from recsys.testing.kit import Check, expect
from recsys.testing.modules import ROWS, Inputs


class Subject:
    """`[B, F], [B, F] -> [B, F, D]`."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self.factory = factory

    def schema(self, count: int = 3) -> EncodedSchema:
        """Return categorical fields, one numeric field and a history."""
        return samples.schema(count - 1, 1)

    def build(self, count: int = 3) -> nn.Module:
        """Build on a schema of `count` fields."""
        module: nn.Module = self.factory(self.schema(count))
        return module

    def inputs(self, rows: int, count: int = 3) -> Inputs:
        """`ids [B, F], values [B, F]`."""
        batch = samples.batch(rows, self.schema(count))
        return batch.ids, cast("Tensor", batch.values)

    def shape(self, module: nn.Module, rows: int, count: int = 3) -> tuple[int, ...]:
        """`[B, F, D]`, D as the component declares it."""
        return (rows, count, _fields(module).dim)

    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """B."""
        return ({0: batch}, {0: batch})

    def objective(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """The output and the history."""
        events, _ = samples.batch(ROWS, self.schema(inputs[0].shape[1])).history["clicks"]
        return modules.random_sum(module(*inputs)) + modules.random_sum(
            modules.call(module, "history", "clicks", events)
        )


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of an embedding."""
    subject = Subject(build)
    return [
        *modules.checks(subject),
        Check(
            "fields", "set `self.fields = Fields(names, rows, dim)` in the schema's order", lambda: _declared(subject)
        ),
        Check(
            "history", "look events up in the rows of the field whose vocabulary they share", lambda: _history(subject)
        ),
        Check("wrong_ids", "read an id outside [0, rows) as unknown or missing", lambda: _wrong_ids(subject)),
        Check(
            "export_tables", "return every tensor that lookups need, by name, detached", lambda: _export_tables(subject)
        ),
        Check(
            "pruned_equals_masked",
            "keep the vectors of what stays to the last bit, and give zeros for what is gone",
            lambda: _pruned(subject),
        ),
        Check("pruned_is_smaller", "copy the kept rows and dimensions into new tensors", lambda: _smaller(subject)),
    ]


def _fields(module: nn.Module) -> Fields:
    fields = getattr(module, "fields", None)
    expect(isinstance(fields, Fields), f"`fields` is {type(fields).__name__}, expected Fields")
    return cast("Fields", fields)


def _built(subject: Subject) -> nn.Module:
    torch.manual_seed(1)
    return modules.disturb(subject.build(), scale=1.0).eval()


def _declared(subject: Subject) -> None:
    fields, schema = _fields(subject.build()), subject.schema()
    wanted = tuple((f.name, f.rows) for f in schema.fields)
    found = tuple(zip(fields.names, fields.rows, strict=True))
    expect(found == wanted, f"`fields` says {found}, the schema {wanted}")
    expect(fields.dim > 0, f"`fields.dim` is {fields.dim}")


def _history(subject: Subject) -> None:
    module = _built(subject)
    batch = samples.batch(ROWS, subject.schema())
    events, _ = batch.history["clicks"]  # [B, L, 1], of the rows of the first field
    found = modules.call(module, "history", "clicks", events)
    wanted_shape = (*events.shape, _fields(module).dim)
    expect(tuple(found.shape) == wanted_shape, f"history returned {tuple(found.shape)}, expected {wanted_shape}")
    ids, values = subject.inputs(samples.LENGTH)
    ids[:, 0] = events[0, :, 0]
    modules.close(found[0, :, 0], module(ids, values)[:, 0], "an event and the field that it shares rows with", 1e-6)


def _wrong_ids(subject: Subject) -> None:
    module = _built(subject)
    for f, field in enumerate(subject.schema().fields):
        ids, values = subject.inputs(field.rows)
        ids[:, f], values[:, f] = torch.arange(field.rows), 1.0
        known = module(ids, values)[:, f]  # [rows, D]
        for wrong in (-1, field.rows, field.rows + 1000):
            ids[:1, f] = wrong
            got = module(ids, values)[0, f]
            own = bool((known == got).all(1).any()) or not bool(got.any())
            expect(own, f"id {wrong} of '{field.name}' (rows {field.rows}) reads a row of another field")


def _export_tables(subject: Subject) -> None:
    tables = modules.call(_built(subject), "export_tables")
    expect(isinstance(tables, Mapping) and len(tables) > 0, "export_tables must return a mapping with a table in it")
    for name, table in tables.items():
        expect(isinstance(table, Tensor) and not table.requires_grad, f"export_tables['{name}'] must be detached")
        if table.is_floating_point():
            modules.finite(table, f"export_tables['{name}']")


def _selections(module: nn.Module, schema: EncodedSchema) -> dict[str, Selection]:
    fields = _fields(module)
    rows = torch.ones(schema.fields[0].rows, dtype=torch.bool)
    rows[3:] = False
    dims = torch.ones(fields.dim, dtype=torch.bool)
    dims[fields.dim // 2 :] = False
    return {
        "one field dropped": Selection(fields.names[:-1]),
        "rows dropped": Selection(fields.names, rows={fields.names[0]: rows}),
        "dimensions dropped": Selection(fields.names, dims={fields.names[1]: dims}),
        "everything kept": Selection(fields.names),
    }


def _pruned(subject: Subject) -> None:
    module, schema = _built(subject), subject.schema()
    fields = _fields(module)
    batch = samples.batch(40, schema)
    before = module(batch.ids, batch.values)
    for what, selection in _selections(module, schema).items():
        smaller = modules.call(module, "prune", selection).eval()
        wanted = before * _mask(selection, fields, batch.ids)
        modules.close(smaller(batch.ids, batch.values), wanted, f"{what}: pruned and masked", 1e-6)
        expect(
            torch.equal(module(batch.ids, batch.values), before), f"{what}: prune changes the embedding it is called on"
        )


def _smaller(subject: Subject) -> None:
    module, schema = subject.build(4).eval(), subject.schema(4)
    full = _bytes(module)
    kept = _fields(module).names[:1]
    few = modules.call(module, "prune", Selection(kept))
    expect(_bytes(few) < full, f"keeping 1 of {len(schema.fields)} fields takes {_bytes(few)} bytes, all take {full}")


def _bytes(module: nn.Module) -> int:
    return sum(table.nbytes for table in modules.call(module, "export_tables").values())


def _mask(selection: Selection, fields: Fields, ids: Tensor) -> Tensor:
    """`[B, F, D]` of zeros and ones."""
    columns = []
    for f, name in enumerate(fields.names):
        rows = selection.rows.get(name, torch.ones(fields.rows[f], dtype=torch.bool))
        dims = selection.dims.get(name, torch.ones(fields.dim, dtype=torch.bool))
        columns.append(rows[ids[:, f]].unsqueeze(1) * dims * (name in selection.fields))  # [B, D]
    return torch.stack(columns, 1)
