"""What a trained model tells of a sensitive attribute: probes that are trained anew, on users and on what they get."""

from __future__ import annotations

import importlib.util
import json
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import PositiveInt
from torch import Tensor

from recsys.api import Batch, Component, EvalBatches, Model, RecipeError, Run, hookimpl

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SAYS = ("auc", "accuracy", "macro_f1", "largest_class")
"""What is told of each probe."""
PAIRS = 1 << 18
"""Users times items that are scored at a time."""


class AttributeProbe:
    """How well a fresh logistic regression tells `attribute` from the vectors of users, and from what they would get.

    A user is the rows of one `group` that have a known attribute; of each, the newest row of the split is looked at, as
    the model scores it. Of users: the vector that the sequence encoder makes of the history. Of what they get, with
    `top`: which items the model ranks highest for the user, of all but those of the history, as zeros and ones. Each
    time the probe is judged on folds of users that it has not seen: AUC (of several classes the mean of each against
    the others), accuracy and macro-F1, beside the share of the largest class. Half the AUC is what tells nothing; what
    a discriminator says that was trained with the model is never reported. Written to `probe.json`.

    Needs scikit-learn: the extra `trees`.

    Args:
        split: whose rows are read.
        top: number of items that each user gets; 0 leaves this probe out. Only for encoders that do not look at the
            target.
        folds: number of folds.
        seed: of the folds.

    Raises:
        RecipeError: scikit-learn is not installed.
    """

    name = "attribute_probe"

    def __init__(
        self, *, split: Literal["train", "valid", "test"] = "test", top: int = 10, folds: PositiveInt = 5, seed: int = 0
    ) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise RecipeError("attribute_probe needs scikit-learn: pip install 'recsys[trees]'")
        self.split, self.top, self.folds, self.seed = split, top, folds, seed

    def run(self, run: Run) -> None:
        """Write and print what the probes say.

        Raises:
            RecipeError: the recipe has no history with a target, or no context column `group` or `attribute`.
        """
        if not run.world.leads:
            return
        schema = run.schema
        for need in ("group", "attribute"):
            if need not in schema.context:
                raise RecipeError(f"{run.stage}: needs the context column '{need}'; name it under data.context")
        if not schema.histories or len(schema.histories[0].target) != 1:
            raise RecipeError(f"{run.stage}: needs a history of one column with a target")
        training = run.model.training
        run.model.eval()
        with torch.inference_mode():
            users, attribute, got = self._read(run, self._newest(run))
        run.model.train(training)
        found = {"users": self._probe(users.numpy(), attribute.numpy())}
        if self.top:
            found[f"top_{self.top}"] = self._probe(got.numpy(), attribute.numpy())
        run.stage_folder.mkdir(parents=True, exist_ok=True)
        (run.stage_folder / "probe.json").write_text(json.dumps(found, indent=1))
        for name, says in found.items():
            run.scores.setdefault(self.split, {}).update({f"probe_{name}_{k}": v for k, v in says.items()})
            told = ", ".join(f"{k} {v:.4f}" for k, v in says.items())
            run.say(f"{run.stage} · {name}: {told} ({len(attribute):,} users)")

    def results(self) -> tuple[str, ...]:
        """Their names among the scores of the split."""
        probes = ("users", f"top_{self.top}") if self.top else ("users",)
        return tuple(f"probe_{probe}_{name}" for probe in probes for name in SAYS)

    def _newest(self, run: Run) -> Ints:
        """The newest row of each user with a known attribute, `[users]`."""
        groups, attributes = [], []
        for _, batch in EvalBatches(run.split(self.split), run.train.eval_batch_size):
            groups.append(batch.context["group"])
            attributes.append(batch.context["attribute"])
        group, known = torch.cat(groups).numpy(), torch.cat(attributes).numpy() >= 0
        if not known.any():
            raise RecipeError(f"{run.stage}: no row of the {self.split} split has a known attribute")
        rows = np.flatnonzero(known)[::-1]
        newest: Ints = np.sort(rows[np.unique(group[rows], return_index=True)[1]])
        return newest

    def _read(self, run: Run, rows: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of users `[U, W]`, attributes `[U]`, and which items they get `[U, I]`, on the CPU."""
        users, attributes, got = [], [], []
        for _, whole in EvalBatches(run.split(self.split), 256, rows=rows):
            batch = whole.to(run.device)
            pooled = _pooled(run.model, batch)
            users.append(pooled.flatten(1).double().cpu())
            attributes.append(whole.context["attribute"])
            if self.top:
                got.append(_best(run, batch, pooled, self.top).cpu())
        return torch.cat(users), torch.cat(attributes), torch.cat(got) if got else torch.zeros(0)

    def _probe(self, x: Floats, attribute: Ints) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score, roc_auc_score
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        classes, y = np.unique(attribute, return_inverse=True)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced", C=0.1))
        folds = StratifiedKFold(self.folds, shuffle=True, random_state=self.seed)
        p = cross_val_predict(model, x, y, cv=folds, method="predict_proba")
        score: Any = p[:, 1] if len(classes) == 2 else p
        values = (
            roc_auc_score(y, score, multi_class="ovr"),
            (p.argmax(1) == y).mean(),
            f1_score(y, p.argmax(1), average="macro"),
            np.bincount(y).max() / len(y),
        )
        return {name: float(value) for name, value in zip(SAYS, values, strict=True)}


def _pooled(model: Model, batch: Batch) -> Tensor:
    """What the encoder makes of the first history, `[B, 1, D]`."""
    x = model.represent(batch.ids, batch.values, batch.history)
    return x[:, batch.ids.shape[1] :][:, :1]


def _best(run: Run, batch: Batch, pooled: Tensor, top: int) -> Tensor:
    """Which items the model ranks highest for each row, `[B, I]` of zeros and ones.

    Raises:
        RecipeError: the encoder looks at the target, so that a user has no vector without one.
    """
    model, history = run.model, run.schema.histories[0]
    names = [field.name for field in run.schema.fields]
    column = names.index(history.target[0])
    items = torch.arange(2, run.schema.fields[column].rows, device=batch.ids.device)
    other = batch.ids.clone()
    other[:, column] = other[:, column].roll(1)
    if not torch.allclose(_pooled(model, Batch(other, batch.values, batch.history)), pooled, atol=1e-5):
        raise RecipeError(f"{run.stage}: top: the sequence encoder looks at the target; set `top: 0`")
    rest = model.represent(batch.ids, batch.values, batch.history)[:, len(names) :]  # [B, H, D]
    chosen = torch.zeros(len(batch), len(items), device=batch.ids.device)
    some = max(PAIRS // len(items), 1)
    for low in range(0, len(batch), some):
        rows = torch.arange(low, min(low + some, len(batch)), device=batch.ids.device)
        each = rows.repeat_interleave(len(items))
        ids = batch.ids[each]
        ids[:, column] = items.repeat(len(rows))
        values = None if batch.values is None else batch.values[each]
        x = torch.cat([model.selector(model.embedding(ids, values), ids), rest[each]], 1)
        score = model.decide(x, ids, values)[run.schema.tasks[0]].view(len(rows), -1)
        past, length = batch.history[history.name]
        taken = past[rows, :, 0] - 2
        valid = (torch.arange(taken.shape[1], device=taken.device) < length[rows, None]) & (taken >= 0)
        score = score.scatter_add(1, taken.clamp(min=0), torch.where(valid, -torch.inf, 0.0).to(score.dtype))
        chosen[rows] = torch.zeros_like(score).scatter(1, score.topk(top, 1).indices, 1.0)
    return chosen


@hookimpl
def recsys_components() -> list[Component]:
    """Return the stage."""
    return [Component("stage", "attribute_probe", AttributeProbe)]
