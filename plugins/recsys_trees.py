"""Fields ranked from the encoded training rows alone, by models of scikit-learn, before anything is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveInt

from recsys.api import (
    NULL_ID,
    Best,
    Component,
    EvalBatches,
    Fields,
    RankedFields,
    Ranking,
    RecipeError,
    Run,
    gather_rows,
    hookimpl,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Positive = Annotated[float, Field(gt=0)]
Inputs = Literal["ids", "target"]
Importance = Callable[[Floats, Floats, Floats | None, int], Floats]
"""Inputs `[n, F]`, labels `[n]`, weights of the rows `[n]` and a seed to what each input matters, `[F]`."""

READ = 1 << 14
"""Rows read at once."""
FOLDS = 5
"""Parts of the rows; the labels of one never make up its own inputs."""
PRIOR = 10.0
"""Rows that the click rate of all ids weighs in that of each."""


def gbdt(
    fields: Fields,
    *,
    trees: PositiveInt = 100,
    learning_rate: Positive = 0.1,
    depth: PositiveInt = 3,
    inputs: Inputs = "ids",
    rows: PositiveInt | None = 100_000,
    keep: Best = 0.5,
) -> RankedFields:
    """Ranks fields by the gain of gradient-boosted trees on the ids of training rows.

    I_f = the share of all that the splits on field f take off the squared error of the gradients. Friedman, "Greedy
    Function Approximation: A Gradient Boosting Machine", Annals of Statistics 29, 2001; as a selector in ERASE
    (arXiv 2403.12660), whose options are the defaults. Needs scikit-learn: the extra `trees`. 100,000 rows of 34 fields
    take a minute or more.

    A tree splits the ids, most frequent values first, as if they were numbers. A field of many ids whose order says
    nothing is hard to split, and the more places there are to split at, the better one of them fits by chance: noise of
    many values outranks noise of few. Plant some (`data.noise`) to see how much. `inputs: target` replaces ids by click
    rates, in whose order a few splits say all. Histories are not seen. Nothing is trained before.

    Args:
        fields: of the model.
        trees: number of trees.
        learning_rate: by which each tree is shrunk.
        depth: of each tree.
        inputs: ids as they are, or target: the mean label of other rows with the same id.
        rows: how many of the training rows are used, drawn at random. null: all; they are held in memory.
        keep: how many fields are kept: a number, or a share such as 0.5.
    """
    require("gbdt")

    def importance(x: Floats, y: Floats, weight: Floats | None, seed: int) -> Floats:
        from sklearn.ensemble import GradientBoostingClassifier

        model = GradientBoostingClassifier(
            n_estimators=trees, learning_rate=learning_rate, max_depth=depth, random_state=seed
        )
        found: Floats = model.fit(x, y, sample_weight=weight).feature_importances_
        return found

    return RankedFields(fields, Shallow(importance, inputs, rows), keep)


def random_forest(
    fields: Fields,
    *,
    trees: PositiveInt = 10,
    inputs: Inputs = "ids",
    rows: PositiveInt | None = 100_000,
    keep: Best = 0.5,
) -> RankedFields:
    """Ranks fields by the impurity that a random forest takes off the ids of training rows.

    I_f = the mean over trees of the share of the Gini impurity that splits on field f take off. Breiman, "Random
    Forests", Machine Learning 45, 2001; as a selector in ERASE (arXiv 2403.12660). Needs scikit-learn: the
    extra `trees`.

    The trees grow until every leaf is pure, so that most splits fit noise, and go to the fields that offer most of
    them: the score tells first of all how many different values a field has. On the simulated logs of the quickstart
    random numbers come before all fields, and real fields rank among planted noise as if by lot; so they do on Frappe,
    but for the item. `inputs: target` mends a part of it on the former and nothing on the latter. Histories are not
    seen. Nothing is trained before.

    Args:
        fields: of the model.
        trees: number of trees.
        inputs: ids as they are, or target: the mean label of other rows with the same id.
        rows: how many of the training rows are used, drawn at random. null: all; they are held in memory.
        keep: how many fields are kept: a number, or a share such as 0.5.
    """
    require("random_forest")

    def importance(x: Floats, y: Floats, weight: Floats | None, seed: int) -> Floats:
        from sklearn.ensemble import RandomForestClassifier

        forest = RandomForestClassifier(n_estimators=trees, random_state=seed)
        found: Floats = forest.fit(x, y, sample_weight=weight).feature_importances_
        return found

    return RankedFields(fields, Shallow(importance, inputs, rows), keep)


def rf_permutation(
    fields: Fields,
    *,
    trees: PositiveInt = 10,
    repeats: PositiveInt = 5,
    scoring: Literal["accuracy", "roc_auc"] = "accuracy",
    inputs: Inputs = "ids",
    rows: PositiveInt | None = 100_000,
    keep: Best = 0.5,
) -> RankedFields:
    """Ranks fields by what a random forest loses on its own training rows when one field is shuffled.

    I_f = score(rows) − mean_r score(rows with field f shuffled), the score of the forest of `random_forest`. This is
    what ERASE (arXiv 2403.12660) calls permutation; it is not what a trained recommender loses on rows that it has not
    learned from. Needs scikit-learn: the extra `trees`.

    The forest has learned its rows by heart, and misses a field that it knows them by like one that tells something:
    useless fields of many values do not come to 0, but to what useful ones of little use have. Histories are not seen.
    Nothing is trained before.

    Args:
        fields: of the model.
        trees: number of trees.
        repeats: number of shuffles.
        scoring: what is lost; accuracy changes little where most labels are the same.
        inputs: ids as they are, or target: the mean label of other rows with the same id.
        rows: how many of the training rows are used, drawn at random. null: all; they are held in memory.
        keep: how many fields are kept: a number, or a share such as 0.5.
    """
    require("rf_permutation")

    def importance(x: Floats, y: Floats, weight: Floats | None, seed: int) -> Floats:
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.inspection import permutation_importance

        forest = RandomForestClassifier(n_estimators=trees, random_state=seed).fit(x, y, sample_weight=weight)
        lost = permutation_importance(
            forest, x, y, scoring=scoring, n_repeats=repeats, random_state=seed, sample_weight=weight
        )
        found: Floats = lost.importances_mean
        return found

    return RankedFields(fields, Shallow(importance, inputs, rows), keep)


def lasso(
    fields: Fields,
    *,
    alpha: Positive = 1e-3,
    inputs: Inputs = "ids",
    rows: PositiveInt | None = 100_000,
    keep: Best = 0.5,
) -> RankedFields:
    """Ranks fields by the size of their weight in a linear regression with an L1 penalty.

    min_w mean_b ½ (y_b − w·x_b − w_0)² + α ‖w‖₁, I_f = |w_f|. Tibshirani, "Regression Shrinkage and Selection via the
    Lasso", JRSS B 58, 1996; as a selector in ERASE (arXiv 2403.12660). Needs scikit-learn: the
    extra `trees`.

    A weak baseline on purpose: ids are taken for numbers, most frequent values first, and are not scaled, so that a
    field of many ids has a small weight whatever it tells. `inputs: target` gives it click rates instead, which are on
    one scale; those of weak fields differ so little that α makes their weights 0. Histories are not seen. Nothing is
    trained before.

    Args:
        fields: of the model.
        alpha: α; larger ones make more weights exactly 0.
        inputs: ids as they are, or target: the mean label of other rows with the same id.
        rows: how many of the training rows are used, drawn at random. null: all; they are held in memory.
        keep: how many fields are kept: a number, or a share such as 0.5.
    """
    require("lasso")

    def importance(x: Floats, y: Floats, weight: Floats | None, seed: int) -> Floats:
        from sklearn.linear_model import Lasso

        found: Floats = np.abs(Lasso(alpha=alpha).fit(x, y, sample_weight=weight).coef_)
        return found

    return RankedFields(fields, Shallow(importance, inputs, rows), keep)


def require(name: str) -> None:
    """Look for scikit-learn, which is loaded only when fields are ranked.

    Raises:
        RecipeError: it is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise RecipeError(f"the selector '{name}' needs scikit-learn; install it with `pip install \"recsys[trees]\"`")


@dataclass(frozen=True)
class Shallow:
    """Ranks the fields of a run by its training rows; of several tasks, by the mean of what each says.

    A number that is missing counts as 0, which is the mean of a scaled one. Rows have the weights that the recipe gives
    them. The first process does the work; for the arguments see `gbdt`.
    """

    importance: Importance
    inputs: Inputs
    rows: int | None

    def __call__(self, run: Run) -> Ranking:
        """Fit and look.

        Raises:
            RecipeError: a label is the same in all rows that were drawn.
        """
        shards = run.split("train")
        at = self.drawn(run, len(shards))
        labels = {task: shards.labels(task)[at].astype(np.float64) for task in run.schema.tasks}
        for task, y in labels.items():
            if y.min() == y.max():
                raise RecipeError(
                    f"{run.stage}: label '{task}' is {y[0]:.0f} in all {len(y):,} training rows that fields are ranked "
                    "by; take more `rows`"
                )
        names = run.model.embedding.fields.names
        found = torch.zeros((0, len(names)), dtype=torch.float64)
        if run.world.leads:
            x, weight = self.read(run, at)
            each = [
                self.importance(self.encoded(run, x, y, weight), y, weight, run.seed("rank_fields", "model") % 2**32)
                for y in labels.values()
            ]
            order = [field.name for field in run.schema.fields]
            found = torch.from_numpy(np.mean(each, axis=0)[[order.index(name) for name in names]])[None]
        scores = gather_rows(found.to(run.device))[0].tolist()
        return Ranking(dict(zip(names, scores, strict=True)))

    def drawn(self, run: Run, total: int) -> Ints:
        """Which of the rows are used, in the order of the files."""
        if self.rows is None or self.rows >= total:
            return np.arange(total)
        found = np.random.default_rng(run.seed("rank_fields", "rows")).choice(total, self.rows, replace=False)
        return np.sort(found)

    def read(self, run: Run, at: Ints) -> tuple[Floats, Floats | None]:
        """Return inputs `[n, F]`, ids or numbers in the order of the schema, and weights of rows `[n]`."""
        shards = run.split("train")
        numeric = np.array([field.numeric for field in run.schema.fields])
        x, weights = np.empty((len(at), len(numeric))), []
        for low, batch in EvalBatches(shards, READ, rows=None if len(at) == len(shards) else at):
            part = x[low : low + len(batch)]
            ids = batch.ids.numpy()
            part[:] = ids
            if batch.values is not None:
                part[:, numeric] = np.where(ids == NULL_ID, 0.0, batch.values.numpy())[:, numeric]
            weights += [batch.context["weight"].double().numpy()] if "weight" in batch.context else []
        return x, np.concatenate(weights) if weights else None

    def encoded(self, run: Run, x: Floats, y: Floats, weight: Floats | None) -> Floats:
        """Return the inputs, ids replaced by click rates if so wanted."""
        if self.inputs == "ids":
            return x
        fold = np.random.default_rng(run.seed("rank_fields", "folds")).permutation(len(y)) % FOLDS
        made = x.copy()
        for i, field in enumerate(run.schema.fields):
            if not field.numeric:
                made[:, i] = click_rates(x[:, i], y, np.ones_like(y) if weight is None else weight, fold)
        return made


def click_rates(ids: Floats, y: Floats, weight: Floats, fold: Ints) -> Floats:
    """Mean label of the rows with the same id in the other folds, drawn towards that of all rows, `[n] -> [n]`.

    An id that no other fold has gets the mean of all rows exactly, so that ids of single rows tell nothing.

    Args:
        ids: of the rows.
        y: their labels.
        weight: of the rows.
        fold: which fold each is in.
    """
    value = np.unique(ids, return_inverse=True)[1]
    cell, cells = value * FOLDS + fold, (int(value.max()) + 1) * FOLDS

    def of_others(amount: Floats) -> Floats:
        inside = np.bincount(cell, amount, cells).reshape(-1, FOLDS)
        found: Floats = (inside.sum(1, keepdims=True) - inside).ravel()[cell]
        return found

    rates: Floats = (of_others(weight * y) + PRIOR * np.average(y, weights=weight)) / (of_others(weight) + PRIOR)
    return rates


@hookimpl
def recsys_components() -> list[Component]:
    """Return the selectors."""
    stages = ({"use": "rank_fields"}, {"use": "prune"}, {"use": "fit"}, {"use": "evaluate"}, {"use": "export"})
    return [
        Component("selector", "gbdt", gbdt, stages),
        Component("selector", "random_forest", random_forest, stages),
        Component("selector", "rf_permutation", rf_permutation, stages),
        Component("selector", "lasso", lasso, stages),
    ]
