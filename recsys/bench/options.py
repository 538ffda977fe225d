"""The blocks of a benchmark table, as they stand in its file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Vary(_Strict):
    """An option that a row of the table is repeated with."""

    option: str = Field(description="path of the option in the recipe, such as `model.embedding.budget`")
    values: list[Any] = Field(min_length=1, description="its values; each gives a row called `name@value`")


class Plot(_Strict):
    """A picture of the table: one point for every row, one line for every row that is varied."""

    x: Literal["bytes", "embedding_bytes", "parameters", "epoch_seconds", "value"] = Field(
        "embedding_bytes", description="what goes to the right; `value` is that of the varied option"
    )
    y: str = Field("auc", description="metric that goes upwards")
    log: bool = Field(True, description="logarithmic scale to the right")


class Row(_Strict):
    """A recipe of the table."""

    recipe: str | None = Field(
        default=None,
        description="recipe file, relative to the table's folder, or one that comes with recsys; by default the base "
        "of a selection table",
    )
    name: str | None = Field(
        default=None, description="in the table; by default that of `selector`, else the recipe's file name"
    )
    selector: str | dict[str, Any] | None = Field(
        default=None, description="takes the place of the recipe's selector, with the stages that it names"
    )
    overrides: list[str] = Field(default=[], description="changes of the recipe, such as `train.learning_rate=0.01`")
    vary: dict[str, Any] | None = Field(default=None, description="{option, values}: one row for each value")
    published: dict[str, float] = Field(default={}, description="metric -> published value")
    source: str = Field(default="", description="where and how that was measured")


class Table(_Strict):
    """Recipes to train with several seeds each."""

    rows: list[dict[str, Any]] = Field(min_length=1, description="the recipes")
    metrics: list[str] = Field(
        default=["auc", "logloss"],
        min_length=1,
        description="columns of the table; `task/metric` if there are several tasks",
    )
    split: str = Field(default="test", description="split on which they are measured")
    seeds: int = Field(default=5, ge=1, description="runs of each recipe")
    first_seed: int = Field(default=2021, ge=0, description="train.seed of the first run; the others follow")
    overrides: list[str] = Field(default=[], description="changes of every recipe, such as `train.threads=1`")
    plot: dict[str, Any] | None = Field(default=None, description="{x, y, log}: a picture of the table, plot.svg")
    selection: dict[str, Any] | None = Field(
        default=None, description="{base, overrides, shares, reference}: rows rank fields, and the best ones are judged"
    )


class Selection(_Strict):
    """How the rankings of fields are judged: by a recipe that is trained with the best of them, and nothing else."""

    base: str = Field(description="recipe that is trained; it has no selector, and no stages but fit and evaluate")
    overrides: list[str] = Field(default=[], description="changes of the base, after those of the table")
    shares: list[Share] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        min_length=1,
        description="shares of the fields that it is trained with; at least one field each",
    )
    planted: list[str] = Field(
        default=[], description="fields of the logs that are known to tell nothing, beside those of `data.noise`"
    )
    informative: list[str] = Field(
        default=[], description="fields that are known to tell something; by default all that are not planted"
    )
    reference: str | None = Field(default=None, description="row whose scores those of the others are compared with")
