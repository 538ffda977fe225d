"""Planted faults: the conformance kit catches each, in sequence encoders and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import EncodedSchema, Fields, Selection, Table
from recsys.testing import contract

Caught = Callable[[Any, Any, set[str]], None]


class Pool(nn.Module):
    """Sound: target-gated mean of transformed events."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def valid(self, history: Tensor, length: Tensor) -> Tensor:
        return (torch.arange(history.shape[1]) < length[:, None]).to(history.dtype).unsqueeze(-1)

    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        valid = self.valid(history, length)
        events = self.layer(history) * valid
        mean = events.sum(1) / valid.sum(1).clamp(min=1)
        return mean * (1 + torch.tanh(target))


class CountsPadding(Pool):
    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        return self.layer((history * self.valid(history, length)).mean(1)) * (1 + torch.tanh(target))


class ReadsPadding(Pool):
    def valid(self, history: Tensor, length: Tensor) -> Tensor:
        return torch.ones_like(history[..., :1]) * (length > 0)[:, None, None]


class SkipsNewest(Pool):
    def valid(self, history: Tensor, length: Tensor) -> Tensor:
        return super().valid(history, (length - 1).clamp(min=1))


class NaNOnEmpty(Pool):
    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        valid = self.valid(history, length)
        events = self.layer(history) * valid
        mean = torch.where(length[:, None] > 0, events.sum(1) / valid.sum(1), 0.0)  # zero, but its gradient is NaN
        return mean * (1 + torch.tanh(target))


class TargetOnEmpty(Pool):
    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        return super().forward(target, history, length) + target


class FixedLength(Pool):
    def forward(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        return super().forward(target, history, length) * (1.0 if history.shape[1] >= 5 else 2.0)


class Fused(Table):
    def __init__(self, schema: EncodedSchema) -> None:
        super().__init__(schema, dim=4)


class WrongFields(Fused):
    def __init__(self, schema: EncodedSchema) -> None:
        super().__init__(schema)
        self.fields = Fields(self.fields.names[::-1], self.fields.rows, self.fields.dim)


class OwnHistoryRows(Fused):
    def history(self, group: str, ids: Tensor) -> Tensor:
        return super().history(group, ids) * 2


class Unguarded(Fused):
    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        rows = (ids + self.reader.offset).clamp(0, len(self.weight) - 1)
        e = F.embedding(rows, self.weight)
        return e if values is None else e * values.unsqueeze(-1)


class AttachedTables(Fused):
    def export_tables(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


class PruneKeepsAll(Fused):
    def prune(self, selection: Selection) -> Any:
        return self


class PruneOnlyMasks(Fused):
    def prune(self, selection: Selection) -> Any:
        return Masked(self, super().prune(selection))


class Masked(nn.Module):
    def __init__(self, full: nn.Module, small: nn.Module) -> None:
        super().__init__()
        self.full, self.small = full, small
        self.fields = full.fields

    def forward(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        return self.small(ids, values)

    def export_tables(self) -> Any:
        return self.full.export_tables()


SOUND: list[tuple[Any, Any]] = [
    ("sequence", Pool),
    ("embedding", Fused),
]

FAULTS: list[tuple[Any, Any, set[str]]] = [
    ("sequence", CountsPadding, {"padding_invariance"}),
    ("sequence", ReadsPadding, {"padding_invariance"}),
    ("sequence", SkipsNewest, {"padding_invariance"}),
    ("sequence", NaNOnEmpty, {"empty_history"}),
    ("sequence", TargetOnEmpty, {"empty_history"}),
    ("sequence", FixedLength, {"any_length"}),
    ("embedding", WrongFields, {"fields"}),
    ("embedding", OwnHistoryRows, {"history"}),
    ("embedding", Unguarded, {"wrong_ids"}),
    ("embedding", AttachedTables, {"export_tables"}),
    ("embedding", PruneKeepsAll, {"pruned_equals_masked", "pruned_is_smaller"}),
    ("embedding", PruneOnlyMasks, {"pruned_is_smaller"}),
]


def test_a_sound_component_passes(sound: tuple[Any, Any]) -> None:
    contract(*sound)


def test_a_planted_fault_is_caught(fault: tuple[Any, Any, set[str]], caught: Caught) -> None:
    caught(*fault)


@pytest.mark.parametrize("kind", [kind for kind, _ in SOUND])
def test_every_check_has_a_planted_fault(kind: Any) -> None:
    planted = set().union(*(failed for k, _, failed in FAULTS if k == kind))
    assert planted >= set(contract.checks(kind)) - set(contract.checks("interaction"))
