"""A second model beside the one that is trained, for losses that estimate something themselves."""

from __future__ import annotations

from recsys.contracts import EncodedSchema
from recsys.nn.head import Head
from recsys.nn.interaction import FM
from recsys.nn.model import Model
from recsys.nn.selection import KeepAll
from recsys.nn.sequence import MeanPool
from recsys.nn.table import Table


def second_model(schema: EncodedSchema, dim: int, init_std: float = 0.01) -> Model:
    """Return a factorisation machine on all fields and histories, with first-order weights: `Batch -> {task: [B]}`.

    Args:
        schema: of the encoded rows.
        dim: width of its own embedding.
        init_std: of its embedding.
    """
    table = Table(schema, dim=dim, init_std=init_std)
    pools = {h.name: MeanPool(dim * len(h.columns)) for h in schema.histories if h.target}
    machine = FM(Model.consumer_fields(schema, table))
    return Model(schema, table, KeepAll(table.fields), pools, [machine], Head(schema, [machine], wide=True))
