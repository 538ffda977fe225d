"""Planted faults: the conformance kit catches each, in sources, propensity models, stages and exporters."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

from recsys.api import DataError, EncodedSchema
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
