"""Planted faults: the conformance kit catches each, in interactions.

The checks that all trainable parts share are shown here, once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.api import Batch, Fields, label_bce
from recsys.plugin.hooks import Component
from recsys.testing import Contract, ContractError, contract

Only = Callable[..., Contract]
Caught = Callable[[Any, Any, set[str]], None]


class Mixer(nn.Module):
    """Sound: h = flatten(W e)."""

    def __init__(self, fields: Fields, *, layers: int = 1) -> None:
        super().__init__()
        self.fields = fields
        self.width = len(fields) * fields.dim
        self.is_logit = False
        self.weight = nn.Parameter(torch.randn(len(fields), len(fields)))

    def forward(self, e: Tensor) -> Tensor:
        return torch.einsum("fg,bgd->bfd", self.weight, e).flatten(1)

    def explain(self, e: Tensor) -> dict[str, Tensor]:
        return {"weight": self.weight}


class WrongWidth(Mixer):
    def forward(self, e: Tensor) -> Tensor:
        return super().forward(e)[:, 1:]


class SquareRoot(Mixer):
    def forward(self, e: Tensor) -> Tensor:
        h = super().forward(e)
        return h * h.square().sum(1, keepdim=True).sqrt()


class Unused(Mixer):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.spare = nn.Parameter(torch.zeros(3))


class Judged(Mixer):
    """Sound: what `forward` leaves alone is learned through a loss of its own."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.judge = nn.Parameter(torch.ones(()))

    def penalty(self) -> Tensor:
        return self.judge.square()


class UnusedToo(Judged):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.spare = nn.Parameter(torch.zeros(3))


class Taught(Mixer):
    """Sound: what `forward` leaves alone is learned from the labels."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.judge = nn.Linear(self.width, 1)
        self.logit = torch.zeros(())

    def forward(self, e: Tensor) -> Tensor:
        h = super().forward(e)
        if self.training:
            self.logit = self.judge(h).squeeze(1)
        return h

    def auxiliary(self, batch: Batch) -> Tensor:
        return label_bce(self.logit, batch)


class TaughtAndJudged(Taught):
    """Sound: both terms, each with parameters of its own."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.other = nn.Parameter(torch.ones(()))

    def penalty(self) -> Tensor:
        return self.other.square()


class UntaughtToo(Taught):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.spare = nn.Parameter(torch.zeros(3))


class TaughtRowByRow(Taught):
    def auxiliary(self, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.logit, batch.label["label"], reduction="none")


class TaughtInDouble(Taught):
    def auxiliary(self, batch: Batch) -> Tensor:
        return super().auxiliary(batch).double()


class TaughtNaN(Taught):
    def auxiliary(self, batch: Batch) -> Tensor:
        return super().auxiliary(batch) * torch.nan


class OnlyTheName(Mixer):
    """An option of that name is no loss."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.auxiliary = 1.0


class Detached(Mixer):
    def forward(self, e: Tensor) -> Tensor:
        return super().forward(e.detach())


class BatchStatistics(Mixer):
    def forward(self, e: Tensor) -> Tensor:
        h = super().forward(e)
        return h - h.mean(0)


class Cumulative(Mixer):
    """The first rows see only themselves, so only a later part of the batch shows it."""

    def forward(self, e: Tensor) -> Tensor:
        return super().forward(e).cumsum(0)


class AlwaysDrops(Mixer):
    def forward(self, e: Tensor) -> Tensor:
        return F.dropout(super().forward(e), 0.5)


class Counts(Mixer):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, e: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return super().forward(e)


class OtherRandomness(Mixer):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.weight.data.mul_(random.random())
        self.weight.data.add_(float(np.random.rand()))


class OnTheCPU(Mixer):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.bias = nn.Parameter(torch.zeros(self.width, device="cpu"))

    def forward(self, e: Tensor) -> Tensor:
        return super().forward(e) + self.bias


class OneBatchSize(Mixer):
    def forward(self, e: Tensor) -> Tensor:
        rows = e.shape[0]
        return super().forward(e) * (1.0 if rows > 3 else 1.0 + 0 * rows)


class FieldLoop(Mixer):
    def forward(self, e: Tensor) -> Tensor:
        outputs = [sum(self.weight[f, g] * e[:, g] for g in range(e.shape[1])) for f in range(e.shape[1])]
        return torch.cat(outputs, 1)  # type: ignore[arg-type]


class HiddenState(Mixer):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.scale = torch.randn(())

    def forward(self, e: Tensor) -> Tensor:
        return super().forward(e) * self.scale


class Cancels(Mixer):
    def forward(self, e: Tensor) -> Tensor:
        h = super().forward(e) + 100
        return F.linear(h, torch.eye(h.shape[1])) - 100


class NoLogitFlag(Mixer):
    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.is_logit = None  # type: ignore[assignment]


class ExplainsAList(Mixer):
    def explain(self, e: Tensor) -> Any:
        return [self.weight]


class ExplainChanges(Mixer):
    def explain(self, e: Tensor) -> dict[str, Tensor]:
        self.weight.mul_(2)
        return {}


class KeywordArguments(Mixer):
    def __init__(self, fields: Fields, **options: Any) -> None:
        super().__init__(fields)


SOUND: list[tuple[Any, Any]] = [
    ("interaction", Mixer),
    ("interaction", Judged),
    ("interaction", Taught),
    ("interaction", TaughtAndJudged),
]

FAULTS: list[tuple[Any, Any, set[str]]] = [
    ("interaction", KeywordArguments, {"options"}),
    ("interaction", WrongWidth, {"shapes"}),
    ("interaction", SquareRoot, {"finite"}),
    ("interaction", Unused, {"gradients"}),
    ("interaction", UnusedToo, {"gradients"}),
    ("interaction", UntaughtToo, {"gradients"}),
    ("interaction", TaughtRowByRow, {"gradients"}),
    ("interaction", TaughtInDouble, {"gradients"}),
    ("interaction", TaughtNaN, {"gradients"}),
    ("interaction", OnlyTheName, {"gradients"}),
    ("interaction", Detached, {"gradients"}),
    ("interaction", BatchStatistics, {"rows_independent"}),
    ("interaction", Cumulative, {"rows_independent"}),
    ("interaction", AlwaysDrops, {"eval_deterministic"}),
    ("interaction", Counts, {"eval_deterministic"}),
    ("interaction", OtherRandomness, {"seeded_construction"}),
    ("interaction", OnTheCPU, {"meta_device"}),
    ("interaction", OneBatchSize, {"export_any_batch"}),
    ("interaction", FieldLoop, {"graph_constant_in_fields"}),
    ("interaction", HiddenState, {"state_round_trip"}),
    ("interaction", Cancels, {"bf16_autocast"}),
    ("interaction", NoLogitFlag, {"is_logit"}),
    ("interaction", ExplainsAList, {"explain"}),
    ("interaction", ExplainChanges, {"explain"}),
]


def test_a_sound_component_passes(sound: tuple[Any, Any]) -> None:
    contract(*sound)


def test_a_planted_fault_is_caught(fault: tuple[Any, Any, set[str]], caught: Caught) -> None:
    caught(*fault)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in SOUND}))
def test_every_check_has_a_planted_fault(kind: Any) -> None:
    planted = set().union(*(failed for k, _, failed in FAULTS if k == kind))
    assert planted >= set(contract.checks(kind))


def test_all_failures_are_listed_at_once() -> None:
    class Twice(BatchStatistics, ExplainsAList):
        pass

    with pytest.raises(ContractError) as caught:
        contract("interaction", Twice)
    assert {"rows_independent", "explain"} <= set(caught.value.failed)
    assert "rows 0:3 alone and among 6 rows differ" in str(caught.value)


def test_a_component_and_options_are_accepted(only: Only) -> None:
    light = only("is_logit")
    light(Component("interaction", "mixer", Mixer), layers=2)
    with pytest.raises(
        ContractError, match=r"interaction.layer: 'component' has no option 'layer'. Did you mean 'layers'"
    ):
        light("interaction", Mixer, layer=2)
    with pytest.raises(TypeError, match="contract\\(kind, factory"):
        contract("interaction")


def test_left_out_checks_must_exist() -> None:
    with pytest.raises(ValueError, match=r"no check 'bce_equalty'. Did you mean 'bce_equality'\?"):
        contract.without("bce_equalty")


def test_one_reason_is_said_once_with_its_place():
    class Raises(nn.Module):
        def __init__(self, fields):
            super().__init__()
            raise ValueError("heads must divide width")

    with pytest.raises(ContractError) as caught:
        contract("interaction", Raises)
    text = str(caught.value)
    assert text.count("ValueError: heads must divide width (test_contract_interaction.py:") == 1
    assert "- shapes, finite, gradients, " in text
    assert len(caught.value.failed) > 10
