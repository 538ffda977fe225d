"""Planted faults: the conformance kit catches each, in selectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.api import Fields, Selection
from recsys.testing import contract

Caught = Callable[[Any, Any, set[str]], None]


class Gate(nn.Module):
    """Sound: a soft gate per field while it searches, a hard one at the end."""

    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self.fields = fields
        self.logit = nn.Parameter(torch.full((len(fields),), 0.5))
        self.register_buffer("progress", torch.zeros(()))

    def gate(self) -> Tensor:
        hard = (self.logit > 0).float()
        soft = torch.sigmoid(self.logit)
        final = self.get_buffer("progress") >= 1
        return soft if self.training else torch.where(final, hard, soft)

    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        return e * self.gate()[:, None].to(e.dtype)

    def penalty(self) -> Tensor:
        return 0.1 * torch.sigmoid(self.logit).sum()

    def anneal(self, progress: float) -> None:
        self.get_buffer("progress").fill_(progress)

    def kept(self) -> Selection:
        chosen = (self.logit > 0).tolist()
        return Selection(tuple(n for n, keep in zip(self.fields.names, chosen, strict=True) if keep))

    def scores(self) -> dict[str, Tensor]:
        return dict(zip(self.fields.names, self.logit.detach().unbind(), strict=True))


class Doubled(Gate):
    """Sound: what it keeps is twice as large, and it says so."""

    def gate(self) -> Tensor:
        return 2 * super().gate()

    def factor(self) -> float:
        return 2.0


class FactorForgotten(Gate):
    def gate(self) -> Tensor:
        return 2 * super().gate()


class FactorLies(Doubled):
    def factor(self) -> float:
        return 3.0


class KeptLies(Gate):
    def kept(self) -> Selection:
        return Selection(self.fields.names)


class StaysSoft(Gate):
    def gate(self) -> Tensor:
        return torch.sigmoid(self.logit)


class DropsRowsInSecret(Gate):
    def forward(self, e: Tensor, ids: Tensor) -> Tensor:
        return super().forward(e, ids) * (ids != 3).unsqueeze(-1)


class PythonPenalty(Gate):
    def penalty(self) -> Any:
        return 0.0


class VectorPenalty(Gate):
    def penalty(self) -> Tensor:
        return self.logit


class Forgetful(Gate):
    """The schedule adds up instead of being a function of progress."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.register_buffer("heat", torch.ones(()))

    def anneal(self, progress: float) -> None:
        super().anneal(progress)
        self.get_buffer("heat").add_(progress)

    def gate(self) -> Tensor:
        hard = super().gate()
        return hard if self.get_buffer("progress") >= 1 else hard * self.get_buffer("heat")


class ScheduleNotSaved(Gate):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.heat = 1.0

    def anneal(self, progress: float) -> None:
        super().anneal(progress)
        self.heat = 1.0 + progress

    def gate(self) -> Tensor:
        return super().gate() * (1.0 if self.get_buffer("progress") >= 1 else self.heat)


class KeptDraws(Gate):
    def kept(self) -> Selection:
        torch.rand(1)
        return super().kept()


class KeptNamesStrangers(Gate):
    def kept(self) -> Selection:
        return Selection((*super().kept().fields, "stranger"))


class KeptFloatMask(Gate):
    def kept(self) -> Selection:
        return Selection(super().kept().fields, rows={"f0": torch.ones(5)})


class ScoresMissing(Gate):
    def scores(self) -> dict[str, Tensor]:
        return {"f0": torch.ones(())}


SOUND: list[tuple[Any, Any]] = [
    ("selector", Gate),
    ("selector", Doubled),
]

FAULTS: list[tuple[Any, Any, set[str]]] = [
    ("selector", KeptLies, {"pruned_equals_masked"}),
    ("selector", FactorForgotten, {"pruned_equals_masked"}),
    ("selector", FactorLies, {"pruned_equals_masked"}),
    ("selector", StaysSoft, {"pruned_equals_masked"}),
    ("selector", DropsRowsInSecret, {"pruned_equals_masked"}),
    ("selector", PythonPenalty, {"penalty"}),
    ("selector", VectorPenalty, {"penalty"}),
    ("selector", Forgetful, {"anneal"}),
    ("selector", ScheduleNotSaved, {"anneal"}),
    ("selector", KeptDraws, {"kept"}),
    ("selector", KeptNamesStrangers, {"kept"}),
    ("selector", KeptFloatMask, {"kept"}),
    ("selector", ScoresMissing, {"scores"}),
]


def test_a_sound_component_passes(sound: tuple[Any, Any]) -> None:
    contract(*sound)


def test_a_planted_fault_is_caught(fault: tuple[Any, Any, set[str]], caught: Caught) -> None:
    caught(*fault)


@pytest.mark.parametrize("kind", [kind for kind, _ in SOUND])
def test_every_check_has_a_planted_fault(kind: Any) -> None:
    planted = set().union(*(failed for k, _, failed in FAULTS if k == kind))
    assert planted >= set(contract.checks(kind)) - set(contract.checks("interaction"))
