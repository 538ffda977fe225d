"""Planted faults: the conformance kit catches each, in losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from recsys.api import DataError
from recsys.testing import contract

Caught = Callable[[Any, Any, set[str]], None]


class Weighted(nn.Module):
    """Sound: inverse-propensity-weighted BCE."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.tasks = tasks
        self.needs: tuple[str, ...] = ("propensity",)

    def one(self, logit: Tensor, label: Tensor, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit.float(), label, 1 / batch.context["propensity"])

    def forward(self, logits: Any, batch: Any) -> Tensor:
        return torch.stack([self.one(logits[t], batch.label[t], batch) for t in self.tasks]).mean()


class UndeclaredNeed(Weighted):
    def one(self, logit: Tensor, label: Tensor, batch: Any) -> Tensor:
        return super().one(logit, label, batch) + 0 * batch.context["position"].float().sum()


class HalfPrecision(Weighted):
    def one(self, logit: Tensor, label: Tensor, batch: Any) -> Tensor:
        return (F.softplus(logit) - label.to(logit.dtype) * logit).mean()


class SumNotMean(Weighted):
    def one(self, logit: Tensor, label: Tensor, batch: Any) -> Tensor:
        return super().one(logit, label, batch) * len(label)


class Overflows(Weighted):
    def one(self, logit: Tensor, label: Tensor, batch: Any) -> Tensor:
        p = torch.sigmoid(logit.float())
        return -(label * p.log() + (1 - label) * (1 - p).log()).mean()


class FirstTask(Weighted):
    def forward(self, logits: Any, batch: Any) -> Tensor:
        return self.one(logits[self.tasks[0]], batch.label[self.tasks[0]], batch)


class ChangesBatch(Weighted):
    def one(self, logit: Tensor, label: Tensor, batch: Any) -> Tensor:
        result = super().one(logit, label, batch)
        batch.context["propensity"].mul_(0.5)
        return result


class Mean(Metric):
    """Sound: the mean squared error of the probability."""

    needs: ClassVar[tuple[str, ...]] = ()
    higher_is_better = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, logit: Tensor, label: Tensor) -> None:
        if bool(torch.isnan(logit).any()):
            raise DataError("a prediction is NaN")
        self.rows.append((torch.sigmoid(logit) - label).square())

    def compute(self) -> Tensor:
        if not self.rows:
            return torch.tensor(torch.nan, dtype=torch.float64)
        return torch.cat([r.reshape(-1) for r in self.rows]).double().sort().values.mean()


class NoDirection(Mean):
    higher_is_better = None


class Float32(Mean):
    def compute(self) -> Tensor:
        return super().compute().float()


class AverageOfAverages(Mean):
    def compute(self) -> Tensor:
        return torch.stack([r.mean() for r in self.rows]).mean() if self.rows else super().compute()


class ZeroWhenEmpty(Mean):
    def compute(self) -> Tensor:
        return torch.nan_to_num(super().compute())


class InfiniteForOneClass(Mean):
    def update(self, logit: Tensor, label: Tensor) -> None:
        super().update(logit, label)
        self.rows[-1] = self.rows[-1] + (math.inf if label.min() == label.max() and len(label) > 30 else 0.0)


class SwallowsNaN(Mean):
    def update(self, logit: Tensor, label: Tensor) -> None:
        super().update(torch.nan_to_num(logit), label)


class NotAState(Mean):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def update(self, logit: Tensor, label: Tensor) -> None:
        super().update(logit, label)
        self.total += len(label)

    def compute(self) -> Tensor:
        return super().compute() * (self.total / max(1, sum(len(r) for r in self.rows)))


SOUND: list[tuple[Any, Any]] = [
    ("loss", Weighted),
    ("metric", Mean),
]

FAULTS: list[tuple[Any, Any, set[str]]] = [
    ("loss", UndeclaredNeed, {"needs"}),
    ("loss", HalfPrecision, {"float32_scalar"}),
    ("loss", SumNotMean, {"bce_equality"}),
    ("loss", Overflows, {"gradients"}),
    ("loss", FirstTask, {"every_task"}),
    ("loss", ChangesBatch, {"pure"}),
    ("metric", NoDirection, {"declares"}),
    ("metric", Float32, {"float64_scalar"}),
    ("metric", AverageOfAverages, {"order_invariant"}),
    ("metric", ZeroWhenEmpty, {"undefined_is_nan"}),
    ("metric", InfiniteForOneClass, {"undefined_is_nan"}),
    ("metric", SwallowsNaN, {"nan_refused"}),
    ("metric", NotAState, {"reset"}),
]


def test_a_sound_component_passes(sound: tuple[Any, Any]) -> None:
    contract(*sound)


def test_a_planted_fault_is_caught(fault: tuple[Any, Any, set[str]], caught: Caught) -> None:
    caught(*fault)


@pytest.mark.parametrize("kind", [kind for kind, _ in SOUND])
def test_every_check_has_a_planted_fault(kind: Any) -> None:
    planted = set().union(*(failed for k, _, failed in FAULTS if k == kind))
    assert planted >= set(contract.checks(kind)) - {"options"}
