"""Planted faults: the conformance kit catches each, in sources, propensity models, stages and exporters."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

from recsys.api import Batch, DataError, EncodedSchema
from recsys.testing import contract

Caught = Callable[[Any, Any, set[str]], None]


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


class Position(nn.Module):
    """Sound: 1 / (1 + scale · position)."""

    scale: Tensor

    def __init__(self, schema: EncodedSchema) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((), -1.0))

    def fit(self, rows: Iterable[Batch]) -> None:
        shown = torch.stack([batch.context["observed"].sum() for batch in rows]).sum()
        self.scale.copy_(shown / 40)

    def estimate(self, batch: Batch) -> Tensor:
        if self.scale < 0:
            raise DataError("not fitted")
        return 1 / (1 + self.scale * batch.context["position"].float())


class AboveOne(Position):
    def estimate(self, batch: Batch) -> Tensor:
        return super().estimate(batch) * 1.5


class BatchNormalised(Position):
    def estimate(self, batch: Batch) -> Tensor:
        p = super().estimate(batch)
        return p / p.sum()


class Noisy(Position):
    def fit(self, rows: Iterable[Batch]) -> None:
        self.scale.fill_(random.random())


class LastBatch(Position):
    def fit(self, rows: Iterable[Batch]) -> None:
        for batch in rows:
            self.scale.copy_(batch.context["observed"].sum() / 40)


class SeenIdsOnly(Position):
    """A table of the ids that occur: the rest has no place in it."""

    def fit(self, rows: Iterable[Batch]) -> None:
        self.seen = torch.unique(torch.cat([batch.ids[:, 0] for batch in rows]))
        super().fit(rows)

    def estimate(self, batch: Batch) -> Tensor:
        p = super().estimate(batch)
        table = torch.linspace(0.1, 1, len(self.seen))
        return p * table[batch.ids[:, 0]]


class Forgetful(Position):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        self.scale.fill_(1.0)


class UnfittedGuess(Position):
    def __init__(self, schema: EncodedSchema) -> None:
        super().__init__(schema)
        self.scale.fill_(1.0)


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


SOUND: list[tuple[Any, Any]] = [
    ("source", Three),
    ("propensity", Position),
    ("stage", Nothing),
    ("exporter", Weights),
]

FAULTS: list[tuple[Any, Any, set[str]]] = [
    ("source", Eager, {"lazy"}),
    ("source", Random, {"repeatable"}),
    ("source", OtherColumns, {"same_columns"}),
    ("source", AnySplit, {"unknown_split"}),
    ("propensity", AboveOne, {"range"}),
    ("propensity", BatchNormalised, {"rows_independent"}),
    ("propensity", Noisy, {"repeatable"}),
    ("propensity", LastBatch, {"any_batches"}),
    ("propensity", SeenIdsOnly, {"unseen", "saved"}),
    ("propensity", Forgetful, {"saved"}),
    ("propensity", UnfittedGuess, {"needs_fit"}),
    ("stage", one_for_all, {"builds"}),
    ("stage", NoArgument, {"run"}),
    ("exporter", WritesNothing, {"writes_files"}),
    ("exporter", Pickles, {"no_pickle"}),
    ("exporter", TorchSaves, {"no_pickle"}),
    ("exporter", LeavesEval, {"model_unchanged"}),
    ("exporter", WritesAddress, {"repeatable"}),
]


def test_a_sound_component_passes(sound: tuple[Any, Any]) -> None:
    contract(*sound)


def test_a_planted_fault_is_caught(fault: tuple[Any, Any, set[str]], caught: Caught) -> None:
    caught(*fault)


@pytest.mark.parametrize("kind", [kind for kind, _ in SOUND])
def test_every_check_has_a_planted_fault(kind: Any) -> None:
    planted = set().union(*(failed for k, _, failed in FAULTS if k == kind))
    assert planted >= set(contract.checks(kind)) - {"options"}
