"""The alphabet, the values and the protocols that every part agrees on.

B batch rows · F fields · D embedding dimension · N table rows · L history length ·
K columns per history event · W = K·D · H representation width · R ranks.

Importing this module does not import torch, so that light commands stay light.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    import polars as pl
    import torch
    from torch import Tensor

    Numbers = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

NULL_ID = 0
"""The id of a missing value, in every field."""
UNKNOWN_ID = 1
"""The id of a value that is not in the vocabulary (out-of-vocabulary), in every categorical field."""
FIRST_ID = 2
"""The id of the first value of the vocabulary (the most frequent one)."""

NUMERIC_VALUE_ID = 1
"""A numeric field has two rows: row 0 stands for a missing value, row 1 is multiplied by the value."""


@dataclass(frozen=True)
class Named:
    """Marks an option whose value is the name of a component: `Annotated[str, Named("metric")]`.

    The recipe is refused before anything runs when no such component is installed.
    """

    kind: str


def metric_spec(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return a metric as `{use: NAME, …}`, of which NAME is a short form, and NAME@5 one of `{use: NAME, k: 5}`."""
    if not isinstance(spec, str):
        return dict(spec)
    name, at, k = spec.partition("@")
    return {"use": name, "k": int(k)} if at and k.isdecimal() else {"use": spec}


def metric_name(spec: str | Mapping[str, Any]) -> str:
    """Return what a metric is called in results: its `name`; else NAME@K where a recipe gives it k; else NAME."""
    full = metric_spec(spec)
    return str(full.get("name") or (f"{full['use']}@{full['k']}" if full.get("k") is not None else full["use"]))


@dataclass(frozen=True)
class Field:
    """One input of the model: ids in `[0, rows)`, each field counting from 0.

    Args:
        name: the column's name in the logs.
        rows: number of ids; for a categorical field `FIRST_ID + vocabulary size`.
        numeric: the id is `NUMERIC_VALUE_ID` (row times value) or `NULL_ID` (value missing).
        shares: name of the field whose vocabulary, and so whose table rows, this one uses.
    """

    name: str
    rows: int
    numeric: bool = False
    shares: str | None = None


@dataclass(frozen=True)
class History:
    """A ragged list per row: past events (with a target), or a bag of values (without).

    Args:
        name: group name.
        columns: the K columns of one event, in order.
        max_length: L, the longest list kept (the newest, that is the last, events).
        target: the K fields that the events are compared with; empty for a multi-valued field.
    """

    name: str
    columns: tuple[Field, ...]
    max_length: int
    target: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedSchema:
    """What the fitted encoder produces: the inputs in order, the tasks, the context columns."""

    fields: tuple[Field, ...]
    histories: tuple[History, ...] = ()
    tasks: tuple[str, ...] = ("label",)
    context: tuple[str, ...] = ()

    @property
    def has_numeric(self) -> bool:
        """Whether any field is numeric, that is whether a batch carries `values`."""
        return any(f.numeric for f in self.fields)


@dataclass(frozen=True)
class Fields:
    """What a selector or an interaction sees of `e [B, F, D]`: names and rows per field, and D."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    dim: int

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Batch:
    """One batch of encoded rows; immutable.

    Args:
        ids: `[B, F]` int64, counting from 0 in each field.
        values: `[B, F]` float32, 1 where the field is categorical or missing; None when no field is numeric.
        history: group → (ids `[B, L, K]` int64 padded with `NULL_ID`, length `[B]` int64). The L here is the
            longest list of this batch, at least 1; events stand at positions `0 … length-1`, oldest first.
        label: task → `[B]` float32.
        context: name → `[B]`, for losses and metrics, never features. float32: `weight`; `propensity`, the chance that
            the row was shown; `popularity` of the item; `delay` of a conversion and `elapsed` time since the click, in
            days; `grade` of relevance. int64: `position`, `group`, `time`; `attribute`, the class of a sensitive
            attribute, -1 where unknown; `observed`, 1 where the row was shown (or clicked, for what follows a click);
            `uniform`, 1 for randomised traffic.
            Where rows were sampled: `positive` int64, for a sampled row the index of the logged row it belongs to, -1
            for a logged row; `item` int64, the id of the row's item; `log_q` float32, the log-probability with which
            the sampler draws that item.
        share: factor that turns this batch's mean loss into its part of the optimizer step's mean when the
            step is divided over ranks and micro-batches of unequal size; 1 when it is not divided.
        negatives: m, rows that were sampled for each logged one. B is then N·(1 + m): the N logged rows, and after them
            the m rows of the first one, the m of the second, and so on.
    """

    ids: Tensor
    values: Tensor | None = None
    history: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    label: Mapping[str, Tensor] = field(default_factory=dict)
    context: Mapping[str, Tensor] = field(default_factory=dict)
    share: float = 1.0
    negatives: int = 0

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=non_blocking)

        return replace(
            self,
            ids=move(self.ids),
            values=None if self.values is None else move(self.values),
            history={k: (move(i), move(n)) for k, (i, n) in self.history.items()},
            label={k: move(t) for k, t in self.label.items()},
            context={k: move(t) for k, t in self.context.items()},
        )


SAMPLED = ("positive", "item", "log_q")
"""Context columns that a batch with sampled rows has."""


@dataclass(frozen=True)
class Items:
    """The items that rows are sampled from: those of the train split, numbered from 0.

    Args:
        ids: `[I]` int64, of each item in its field, ascending; neither missing nor unknown values.
        rows: `[I]` int64, how many of the rows that are trained on have the item.
        positives: `[I]` int64, how many of those have a label of 1.
    """

    ids: Numbers
    rows: Numbers
    positives: Numbers

    def __len__(self) -> int:
        return len(self.ids)


class Draws(Protocol):
    """The logged rows that items are sampled for: B of the S rows of an optimizer step."""

    @property
    def items(self) -> Numbers:
        """`[B]` int64, the number of each row's own item; -1 where it is missing or unknown."""
        ...

    @property
    def places(self) -> Numbers:
        """`[B]` int64, where the rows stand in their step."""
        ...

    def uniform(self, count: int, stream: int = 0) -> Floats:
        """Random numbers in (0, 1), `[B, count]` float64.

        They depend on the seed, the epoch, the row's position in it and the stream, and on nothing else: so neither
        the number of processes nor a stop changes what is sampled.
        """
        ...

    def step_items(self) -> Numbers:
        """The numbers of the items of all rows of the step, over all processes and micro-batches, `[S]` int64."""
        ...


@dataclass(frozen=True)
class Selection:
    """What a method chose to keep, as a value that is saved with the run and given to `prune`.

    Args:
        fields: names of the kept fields.
        rows: field → bool `[rows]`, True for a kept row; a field that is absent keeps all its rows.
        dims: field → bool `[D]`, True for a kept dimension; a field that is absent keeps all of them.
        elements: field → bool `[rows, D]`, True for a kept number, where a choice of rows and one of dimensions do not
            say it; a number stays that no mask drops.
        vocabulary: digest of the vocabularies whose ids `rows` and `elements` go by; empty where it is not known.
    """

    fields: tuple[str, ...]
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    dims: Mapping[str, Tensor] = field(default_factory=dict)
    elements: Mapping[str, Tensor] = field(default_factory=dict)
    vocabulary: str = field(default="", kw_only=True)


class Source(Protocol):
    """Raw rows. `kind: source`; the factory takes only its recipe options, plus `root: Path` positionally."""

    def scan(self, split: str) -> pl.LazyFrame:
        """Return the raw rows of a split, lazily."""
        ...


class Embedding(Protocol):
    """ids to vectors. `kind: embedding`; the factory takes `schema: EncodedSchema` positionally."""

    fields: Fields

    def __call__(self, ids: Tensor, values: Tensor | None) -> Tensor:
        """`[B, F], [B, F] -> [B, F, D]`."""
        ...

    def history(self, group: str, ids: Tensor) -> Tensor:
        """`[B, L, K] -> [B, L, K, D]`, from the same rows as the fields whose vocabulary a column shares."""
        ...

    def prune(self, selection: Selection) -> Embedding:
        """Return a physically smaller embedding with the same outputs, exact zeros where something was removed."""
        ...

    def export_tables(self) -> Mapping[str, Tensor]:
        """Every tensor that a serving process must hold, by name."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """As of `torch.nn.Module`."""
        ...


class Selector(Protocol):
    """Gates on what the embedding gives. `kind: selector`; the factory takes `fields: Fields` positionally."""

    def __call__(self, e: Tensor, ids: Tensor) -> Tensor:
        """`[B, F, D], [B, F] -> [B, F, D]`."""
        ...

    def penalty(self) -> Tensor:
        """Regularisation to add to the loss, `[]`."""
        ...

    def anneal(self, progress: float) -> None:
        """Move a schedule to `progress` in `[0, 1]` of the fit stage; called once per step."""
        ...

    def kept(self) -> Selection:
        """The decision so far; a pure read."""
        ...

    def scores(self) -> Mapping[str, Tensor]:
        """Field → importance (`[]`, or `[rows]` for methods that score values); a pure read."""
        ...


class Sequence(Protocol):
    """Target and history to one vector. `kind: sequence`; the factory takes `width: int` (W) positionally."""

    def __call__(self, target: Tensor, history: Tensor, length: Tensor) -> Tensor:
        """`[B, W], [B, L, W], [B] -> [B, W]`; padding never changes the result, an empty history gives zeros."""
        ...


class Interaction(Protocol):
    """Crosses of fields. `kind: interaction`; the factory takes `fields: Fields` positionally.

    Attributes:
        width: H, the width of the output.
        is_logit: the columns are logits already, and the head adds them up; otherwise the head projects them.
    """

    width: int
    is_logit: bool

    def __call__(self, e: Tensor) -> Tensor:
        """`[B, F, D] -> [B, H]`."""
        ...

    def explain(self, e: Tensor) -> Mapping[str, Tensor]:
        """What the layer looked at (attention, weights), by name; empty when there is nothing to show."""
        ...


class Loss(Protocol):
    """Logits to a loss. `kind: loss`; the factory takes `tasks: tuple[str, ...]` positionally.

    A factory with a second positional parameter gets `schema: EncodedSchema` there, for a loss with a model of its own.
    The parameters of a loss that is a `torch.nn.Module` are trained with the model in every `fit` stage, at the rate
    and the decay of its network, and its state is part of checkpoints; `rewind` and `reset` leave it alone, and what
    is exported has nothing of it.

    Attributes:
        needs: the context columns that it reads; a recipe without them is refused. `propensity` may come from the
            recipe's `propensity:` block too.
    """

    needs: tuple[str, ...]

    def __call__(self, logits: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`{task: [B]}, Batch -> []`; the mean over the B rows, in float32."""
        ...


class Sampler(Protocol):
    """Items for unlabelled rows. `kind: sampler`; the factory takes `items: Items` positionally."""

    def draw(self, draws: Draws, count: int) -> Numbers:
        """Draw items for each row, by their numbers: `Draws -> [B, count]` int64, of `draws.uniform` alone."""
        ...

    def log_q(self) -> Floats:
        """The log-probability with which one draw gives each item, `[I]` float64."""
        ...


class Propensity(Protocol):
    """Exposure probabilities. `kind: propensity`; the factory takes `schema: EncodedSchema` positionally.

    In practice a `torch.nn.Module` with buffers. A recipe's `propensity: {use: NAME}` is fitted once, before the first
    stage, and fills `batch.context["propensity"]` of every batch that is read, of any split.
    """

    def fit(self, rows: Iterable[Batch]) -> None:
        """Fit on the rows of the train split, which can be gone through again and again, in the order of the logs.

        Random numbers come from torch, and are seeded.

        Raises:
            DataError: the rows cannot tell what is asked, such as a log without any exposed row.
        """
        ...

    def estimate(self, batch: Batch) -> Tensor:
        """`Batch -> [B]` float32, in (0, 1], each row for itself; on the CPU.

        Raises:
            RecsysError: nothing has been fitted.
        """
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """What was fitted, as tensors whose shapes the schema and the options tell; saved with the run."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Take up what `state_dict` gave; `estimate` then gives the same."""
        ...


class Metric(Protocol):
    """A number about predictions. `kind: metric`; in practice a `torchmetrics.Metric`.

    Attributes:
        needs: the context columns that `update` takes by keyword.
        higher_is_better: direction, for best-checkpoint selection and early stopping.
    """

    needs: tuple[str, ...]
    higher_is_better: bool

    def update(self, logit: Tensor, label: Tensor, **context: Tensor) -> None:
        """Add rows: logit `[B]` float64, label `[B]` in {0, 1}."""
        ...

    def compute(self) -> Tensor:
        """`[]` float64; NaN means undefined (for instance: AUC of one class)."""
        ...


class Stage(Protocol):
    """One step of a recipe's list. `kind: stage`; the factory takes only its recipe options."""

    def run(self, run: Any) -> None:
        """Do the work on `run: recsys.api.Run`; results go to `run.folder` of the stage."""
        ...


class Exporter(Protocol):
    """Writes a model for serving. `kind: exporter`; the factory takes only its recipe options."""

    def export(self, model: Any, example: Batch, folder: Path) -> None:
        """Write `model` under `folder`."""
        ...
