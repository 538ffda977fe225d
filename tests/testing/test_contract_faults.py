"""Every check of the conformance kit catches a fault planted for it, and a sound component passes all of them."""

from __future__ import annotations

import math
import pickle
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from recsys.api import DataError, EncodedSchema, Fields, Selection, Table
from recsys.plugin.hooks import KINDS, Component
from recsys.testing import Contract, ContractError, contract

# --- interactions --------------------------------------------------------------------------------------------------


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


# --- selectors -----------------------------------------------------------------------------------------------------


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


# --- sequences -----------------------------------------------------------------------------------------------------


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


# --- embeddings ----------------------------------------------------------------------------------------------------


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


# --- losses --------------------------------------------------------------------------------------------------------


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


# --- metrics -------------------------------------------------------------------------------------------------------


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


# --- the others ----------------------------------------------------------------------------------------------------


class Three:
    """Sound: three rows."""

    def __init__(self, root: Any) -> None:
        self.splits = {"train": [1, 2, 3], "valid": [4]}

    def scan(self, split: str) -> Any:
        if split not in self.splits:
            raise DataError(f"no split '{split}'; there are train and valid")
        return pl.LazyFrame({"x": self.splits[split]})


class Eager(Three):
    def scan(self, split: str) -> Any:
        return super().scan(split).collect()


class Random(Three):
    def scan(self, split: str) -> Any:
        return super().scan(split).with_columns(y=pl.lit(random.random()))


class OtherColumns(Three):
    def scan(self, split: str) -> Any:
        return super().scan(split).rename({"x": "z"} if split == "valid" else {"x": "x"})


class AnySplit(Three):
    def scan(self, split: str) -> Any:
        return super().scan("train")


class Position:
    """Sound: 1 / (1 + position)."""

    def __init__(self, schema: EncodedSchema) -> None:
        self.scale: float | None = None

    def fit(self, logs: pl.LazyFrame) -> None:
        self.scale = float(logs.select(pl.len()).collect().item() > 0)

    def estimate(self, batch: Any) -> Tensor:
        if self.scale is None:
            raise DataError("not fitted")
        return 1 / (1 + self.scale * batch.context["position"].float())


class AboveOne(Position):
    def estimate(self, batch: Any) -> Tensor:
        return super().estimate(batch) * 1.5


class BatchNormalised(Position):
    def estimate(self, batch: Any) -> Tensor:
        p = super().estimate(batch)
        return p / p.sum()


class Noisy(Position):
    def fit(self, logs: pl.LazyFrame) -> None:
        self.scale = random.random()


class UnfittedGuess(Position):
    def __init__(self, schema: EncodedSchema) -> None:
        self.scale = 1.0


class Nothing:
    """Sound: does nothing."""

    def run(self, run: Any) -> None: ...


SHARED = Nothing()


def one_for_all() -> Nothing:
    return SHARED


class NoArgument:
    def run(self) -> None: ...


class Weights:
    """Sound: the names of the weights."""

    def export(self, model: nn.Module, example: Any, folder: Path) -> None:
        (folder / "names.txt").write_text("\n".join(model.state_dict()))


class WritesNothing(Weights):
    def export(self, model: nn.Module, example: Any, folder: Path) -> None: ...


class Pickles(Weights):
    def export(self, model: nn.Module, example: Any, folder: Path) -> None:
        (folder / "model.bin").write_bytes(pickle.dumps({"a": 1}))


class TorchSaves(Weights):
    def export(self, model: nn.Module, example: Any, folder: Path) -> None:
        torch.save({"a": torch.zeros(1)}, folder / "model.pt")


class LeavesEval(Weights):
    def export(self, model: nn.Module, example: Any, folder: Path) -> None:
        super().export(model.eval(), example, folder)


class WritesAddress(Weights):
    def export(self, model: nn.Module, example: Any, folder: Path) -> None:
        (folder / "where.txt").write_text(str(folder))


SOUND: dict[Any, Any] = {
    "interaction": Mixer,
    "selector": Gate,
    "sequence": Pool,
    "embedding": Fused,
    "loss": Weighted,
    "metric": Mean,
    "source": Three,
    "propensity": Position,
    "stage": Nothing,
    "exporter": Weights,
}

FAULTS: list[tuple[str, Any, set[str]]] = [
    ("interaction", KeywordArguments, {"options"}),
    ("interaction", WrongWidth, {"shapes"}),
    ("interaction", SquareRoot, {"finite"}),
    ("interaction", Unused, {"gradients"}),
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
    ("selector", KeptLies, {"pruned_equals_masked"}),
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
    ("source", Eager, {"lazy"}),
    ("source", Random, {"repeatable"}),
    ("source", OtherColumns, {"same_columns"}),
    ("source", AnySplit, {"unknown_split"}),
    ("propensity", AboveOne, {"range"}),
    ("propensity", BatchNormalised, {"rows_independent"}),
    ("propensity", Noisy, {"repeatable"}),
    ("propensity", UnfittedGuess, {"needs_fit"}),
    ("stage", one_for_all, {"builds"}),
    ("stage", NoArgument, {"run"}),
    ("exporter", WritesNothing, {"writes_files"}),
    ("exporter", Pickles, {"no_pickle"}),
    ("exporter", TorchSaves, {"no_pickle"}),
    ("exporter", LeavesEval, {"model_unchanged"}),
    ("exporter", WritesAddress, {"repeatable"}),
]
SHARED_CHECKS = {"options", *contract.checks("interaction")} - {"is_logit", "explain"}
"""Written once for all trainable parts, so a fault planted in an interaction shows them for the others."""


def only(*names: str) -> Contract:
    """The contract with no other checks than these, which keeps the planted faults quick."""
    every = {name for kind in KINDS for name in contract.checks(kind)} - {"options"}
    return contract.without(*(every - set(names)))


@pytest.mark.parametrize(("kind", "factory"), SOUND.items())
def test_a_sound_component_passes(kind: Any, factory: Any) -> None:
    contract(kind, factory)


@pytest.mark.parametrize(("kind", "factory", "failed"), FAULTS, ids=[f"{k}-{f.__name__}" for k, f, _ in FAULTS])
def test_a_planted_fault_is_caught(kind: Any, factory: Any, failed: set[str]) -> None:
    with pytest.raises(ContractError) as caught:
        only(*failed)(kind, factory)
    assert set(caught.value.failed) == failed
    assert factory.__name__ in str(caught.value)
    assert str(caught.value).count("fix: ") == len(failed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_has_a_planted_fault(kind: Any) -> None:
    planted = set().union(*(failed for k, _, failed in FAULTS if k == kind))
    shared = SHARED_CHECKS if kind in ("embedding", "selector", "sequence") else {"options"}
    assert set(contract.checks(kind)) - shared <= planted


def test_all_failures_are_listed_at_once() -> None:
    class Twice(BatchStatistics, ExplainsAList):
        pass

    with pytest.raises(ContractError) as caught:
        contract("interaction", Twice)
    assert {"rows_independent", "explain"} <= set(caught.value.failed)
    assert "rows 0:3 alone and among 6 rows differ" in str(caught.value)


def test_a_component_and_options_are_accepted() -> None:
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
