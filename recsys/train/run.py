"""A run: the built parts of a recipe, the folder of results, and the state that stages hand on."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from torch import nn

from recsys.abilities import Listwise
from recsys.contracts import EncodedSchema, Exporter, Loss, Metric, Propensity, Selection, metric_name
from recsys.data.encode import Encoder
from recsys.data.sampling import Sampling
from recsys.data.shards import Shards
from recsys.errors import RecipeError, RunError, did_you_mean, listing
from recsys.nn.model import Model
from recsys.nn.quantize import Stored
from recsys.nn.selection import load_selection, save_selection
from recsys.nn.weightless import is_weightless, load_weights, weightless
from recsys.train.checkpoint import load_tensors, read_json, replacing, save_tensors, write_json
from recsys.train.distributed import World, wait_for_all
from recsys.train.options import TrainOptions

Spec = str | Mapping[str, Any]
"""A component as a recipe writes it: its name, or `{use: NAME, **options}`."""

LOSS_STATE = "loss.safetensors"
"""Beside the weights of a stage: what the loss has learned, where it learns."""

Scores = dict[str, dict[str, float]]
"""split → metric → value."""


@runtime_checkable
class PlantedTruth(Protocol):
    """A source that knows the truth behind its labels, as simulated logs do."""

    def reference(self, split: str) -> Mapping[str, float]:
        """Return metric → the best value that any model could reach on `split`."""
        ...


def spec_name(spec: Spec) -> str:
    """Return the name of a component as a recipe writes it."""
    return spec if isinstance(spec, str) else str(spec["use"])


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed for one purpose, so that no two purposes share random numbers."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@dataclass
class Run:
    """What a stage works on.

    Args:
        folder: the run's folder.
        train: the `train:` block.
        encoder: the fitted encoder, raw rows to ids.
        splits: encoded rows of `train`, and `valid` and `test` where there are any.
        build_model: makes the recipe's model with fresh weights from a seed.
        loss: of the recipe.
        propensity: of the recipe, where it has one; what it estimates is in the batches of every split.
        metric: makes a metric from its recipe entry (a name, or a mapping with `use`).
        exporter: the same for an exporter.
        recipe: the resolved recipe, as plain values.
        world: this process among those that train together.
        console: where messages to the user go.
        reference: best values possible, for a source that knows them.
        build_sampling: makes what adds sampled rows to training batches, from a seed; None: nothing does.
        rows_trained: rows that a step of training was made with.
        row_passes: forward passes of one row besides those of these steps; a backward pass counts as two.
        stage_seconds: stage → how long it took, since the run was started or last resumed.
    """

    folder: Path
    train: TrainOptions
    encoder: Encoder
    splits: Mapping[str, Shards]
    build_model: Callable[[int], Model]
    loss: Loss
    metric: Callable[[Spec], Metric]
    exporter: Callable[[Spec], Exporter]
    recipe: Mapping[str, Any]
    world: World = field(default_factory=World)
    console: Console = field(default_factory=Console)
    reference: Callable[[str], Mapping[str, float]] | None = None
    build_sampling: Callable[[int], Sampling] | None = None
    propensity: Propensity | None = None
    stage: str = ""
    scores: Scores = field(default_factory=dict)
    rows_trained: int = 0
    row_passes: int = 0
    seconds_training: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.model = self.build_model(derive_seed(self.train.seed, "weights"))
        self.state: dict[str, Any] = {
            "stages": [],
            "weights": None,
            "selections": [],
            "scale": 1.0,
            "stored": "float32",
            "snapshots": {},
        }

    @property
    def schema(self) -> EncodedSchema:
        """Inputs, tasks and context columns of the encoded rows, a propensity that is estimated among them."""
        schema = self.encoder.schema
        return schema if self.propensity is None else replace(schema, context=(*schema.context, "propensity"))

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        if self.train.accelerator == "cpu" or not torch.cuda.is_available():
            if self.train.accelerator == "gpu":
                raise RecipeError("train.accelerator: 'gpu' was asked for, but torch finds no GPU on this machine")
            return torch.device("cpu")
        return torch.device("cuda", self.world.local_rank)

    @property
    def stage_folder(self) -> Path:
        """Where the running stage keeps its results."""
        return self.folder / self.stage

    def seed(self, *purpose: str | int) -> int:
        """Return the seed of one purpose of this run."""
        return derive_seed(self.train.seed, *purpose)

    def split(self, name: str) -> Shards:
        """Return the encoded rows of a split.

        Raises:
            RecipeError: the data has no such split.
        """
        if name not in self.splits:
            raise RecipeError(
                f"{self.stage}: the data has no split '{name}'.{did_you_mean(name, self.splits)} "
                f"Splits: {listing(self.splits)}"
            )
        return self.splits[name]

    def measuring(self, spec: Spec) -> Metric:
        """Make a metric that the rows have all columns for.

        Raises:
            RecipeError: a context column is missing.
        """
        metric = self.metric(spec)
        for need in metric.needs:
            if need not in self.schema.context:
                raise RecipeError(
                    f"{self.stage}: the metric '{metric_name(spec)}' needs the context column '{need}'; "
                    f"name one under data.context, for instance `{need}: user`{_or_estimated(need)}"
                )
        return metric

    def say(self, text: str) -> None:
        """Tell the user, once however many processes train."""
        if self.world.leads:
            self.console.print(text, highlight=False, soft_wrap=True)

    def complete(self, shards: Shards) -> Shards:
        """Return encoded rows with the propensity that is estimated, where the recipe has one."""
        return shards if self.propensity is None else shards.deriving("propensity", self.propensity.estimate)

    def loss_parameters(self) -> list[nn.Parameter]:
        """Parameters of the loss itself, which a fit stage trains with the model."""
        return list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

    def loss_state(self) -> dict[str, torch.Tensor]:
        """What the loss has learned or counted; empty for most."""
        return dict(self.loss.state_dict()) if isinstance(self.loss, nn.Module) else {}

    def load_loss_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `loss_state` gave."""
        if isinstance(self.loss, nn.Module):
            self.loss.load_state_dict(state)

    @property
    def whole_groups(self) -> bool:
        """Whether the loss compares the rows of a group, so that it must see all of them in one batch."""
        return isinstance(self.loss, Listwise) and self.loss.compares_groups

    def keep_weights(self) -> None:
        """Save the model as it is now, and the loss's state; stages that change the model call this last."""
        if state := self.loss_state():
            self._write_tensors(self.stage_folder / LOSS_STATE, state)
        self._write_tensors(self.stage_folder / "model.safetensors", self.model.state_dict())
        self.state["weights"] = f"{self.stage}/model.safetensors"

    def keep_snapshot(self, name: str) -> None:
        """Save the weights for a later `rewind` to the stage `name`."""
        self._write_tensors(self.stage_folder / "snapshot.safetensors", self.model.state_dict())
        self.found_snapshot(name)

    def found_snapshot(self, name: str) -> None:
        """Note that the running stage has kept its snapshot, now or before it was stopped."""
        self.state["snapshots"][name] = f"{self.stage}/snapshot.safetensors"

    def snapshot(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights that the fit stage `name` kept.

        Raises:
            RecipeError: no earlier stage of that name kept a snapshot.
        """
        known = self.state["snapshots"]
        if name not in known:
            raise RecipeError(f"{self.stage}: {no_snapshot(name, known)}")
        return load_tensors(self.folder / known[name])

    def apply_selection(self, selection: Selection) -> None:
        """Make the model physically smaller, and remember how.

        Raises:
            RecipeError: rows are chosen by the ids of other vocabularies.
        """
        by_id = bool(selection.rows or selection.elements)
        if by_id and selection.vocabulary not in ("", self.encoder.digest):
            raise RecipeError(
                f"{self.stage}: the rows to keep were chosen by the ids of other vocabularies than those of this run; "
                "train on the same data, or choose whole fields"
            )
        selection = replace(selection, vocabulary=self.encoder.digest)
        path = self.stage_folder / "selection.safetensors"
        if self.world.leads:
            with replacing(path) as temporary:
                save_selection(selection, temporary)
        wait_for_all()
        self.state["selections"].append(f"{self.stage}/selection.safetensors")
        self.model = self.model.prune(selection)
        self.state["scale"] = self.model.scale

    def apply_quantization(self, stored: Stored) -> None:
        """Store the numbers of the model's tables in fewer bits, and remember it."""
        self.model = self.model.quantized(stored)
        self.state["stored"] = stored

    def stage_done(self, stage: str) -> None:
        """Write down that a stage is complete, with all that the next one needs."""
        self.state["stages"].append(stage)
        self.state["scores"] = self.scores
        self.state["rows_trained"] = self.rows_trained
        self.state["row_passes"] = self.row_passes
        self.state["seconds_training"] = self.seconds_training
        self.state["stage_seconds"] = self.stage_seconds
        if self.world.leads:
            write_json(self.folder / "state.json", self.state)
        wait_for_all()

    def restore(self) -> None:
        """Take up the state after the last complete stage of this folder.

        Raises:
            RunError: the state or the weights are missing, damaged or of another version.
        """
        path = self.folder / "state.json"
        if not path.exists():
            return
        self.state = _checked_state(path, read_json(path), self.state)
        self.scores = self.state.get("scores", {})
        self.rows_trained = self.state.get("rows_trained", 0)
        self.row_passes = self.state.get("row_passes", 0)
        self.seconds_training = self.state.get("seconds_training", 0.0)
        self.stage_seconds = self.state.get("stage_seconds", {})
        restore_model(self)

    def restore_loss(self) -> None:
        """Give the loss the state that it had after the last complete stage.

        Raises:
            RunError: the file is damaged or of another loss.
        """
        path = (self.folder / (self.state["weights"] or LOSS_STATE)).with_name(LOSS_STATE)
        if not path.exists():
            return
        state = load_tensors(path)
        try:
            self.load_loss_state(state)
        except RuntimeError as error:
            raise RunError(f"{path}: the state does not fit the recipe's loss\n{error}") from None

    def _write_tensors(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        if self.world.leads:
            save_tensors(path, tensors)
        wait_for_all()


def _checked_state(path: Path, found: Any, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was read as a run's state if it has the parts of a fresh one."""
    if not isinstance(found, dict):
        raise RunError(f"{path}: not the state of a run")
    for key, value in fresh.items():
        if key not in found or (value is not None and not isinstance(found[key], type(value))):
            raise RunError(f"{path}: '{key}' is missing or of another kind; written by another version, or altered")
    return found


def _or_estimated(need: str) -> str:
    return ", or add a block `propensity:`" if need == "propensity" else ""


def no_snapshot(name: str, known: Iterable[str]) -> str:
    """Say that there is no snapshot of that name."""
    return (
        f"no snapshot '{name}'.{did_you_mean(name, known)} Snapshots: {listing(known)}. "
        "An earlier fit stage keeps one when it has `name` and `snapshot_epoch`."
    )


def restore_model(run: Run) -> None:
    """Give the run's model the structure and the weights that its folder recorded."""
    with weightless() if is_weightless(run.model) else contextlib.nullcontext():
        for name in run.state["selections"]:
            run.model = run.model.prune(load_selection(run.folder / name))
        if run.state["stored"] != "float32":
            run.model = run.model.quantized(run.state["stored"])
    if run.state["weights"] is not None:
        weights = load_tensors(run.folder / run.state["weights"])
        try:
            load_weights(run.model, weights)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            raise RunError(
                f"{run.folder / run.state['weights']}: the weights do not fit the recipe's model\n{error}"
            ) from None
