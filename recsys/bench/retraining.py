"""How rankings of fields are judged: a plain recipe, trained with the best fields alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.bench.options import Selection
from recsys.errors import RecipeError, did_you_mean, listing
from recsys.plugin.registry import Checked
from recsys.recipe.check import Recipe

AUC = "auc"
PRUNE = "prune"
_PLAIN = ("fit", "evaluate", "export")


@dataclass(frozen=True)
class Retraining:
    """What is trained with the best fields of every ranking.

    Args:
        path: of the base recipe.
        overrides: of the table, then of the base.
        recipe: the base, checked.
        fields: of the model, in the recipe's order.
        planted: those of them that are known to tell nothing.
        informative: those that are known to tell something.
        counts: numbers of fields that it is trained with, rising.
        reference: row whose scores those of the others are compared with.
    """

    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    fields: tuple[str, ...]
    planted: tuple[str, ...]
    informative: tuple[str, ...]
    counts: tuple[int, ...]
    reference: str | None

    @property
    def fit(self) -> dict[str, Any]:
        """The stage that trains, as the base writes it."""
        return next(written(stage) for stage in self.recipe.stages if stage.name == "fit")


def fields_of(recipe: Recipe) -> tuple[str, ...]:
    """The fields that a recipe's selector sees."""
    return (*recipe.data.categorical, *recipe.data.numeric, *recipe.data.planted)


def count(fields: int, share: float) -> int:
    """How many of so many fields a share is; at least one."""
    return max(round(share * fields), 1)


def written(stage: Checked) -> dict[str, Any]:
    """A stage as a recipe writes it."""
    return {"use": stage.name, **{name: stage.options[name] for name in sorted(stage.given)}}


def read_retraining(
    block: Selection, path: Path, recipe: Recipe, overrides: Sequence[str], metrics: Sequence[str]
) -> Retraining:
    """Check the base of a selection table.

    Args:
        block: of the table.
        path: of the base.
        recipe: the base, checked.
        overrides: of every recipe of the table.
        metrics: of the table.

    Raises:
        RecipeError: it would not train with the best fields alone, or the shares make no curve.
    """
    at, said = ("selection", "base"), f"selection.base: {recipe.name}"
    if AUC not in metrics:
        raise RecipeError(f"metrics: a selection table needs '{AUC}'", path=("metrics",))
    if recipe.parts["selector"].name != "keep_all":
        raise RecipeError(f"{said} has a selector of its own ({recipe.parts['selector'].name})", path=at)
    if recipe.head.wide:
        raise RecipeError(
            f"{said} has first-order weights, which would go on reading fields that are left out; add the override "
            "`model.head.wide=false`",
            path=at,
        )
    stages = [stage.name for stage in recipe.stages]
    if stages.count("fit") != 1 or not set(stages) <= set(_PLAIN):
        raise RecipeError(f"{said} has the stages {listing(stages)}; wanted are one fit, and evaluate", path=at)
    fields = fields_of(recipe)
    counts = sorted({count(len(fields), share) for share in block.shares})
    if len(counts) < 2:
        raise RecipeError(
            f"selection.shares: of {len(fields)} fields these shares keep {listing(map(str, counts))}; a curve needs "
            "two different numbers",
            path=("selection", "shares"),
        )
    for key, names in (("planted", block.planted), ("informative", block.informative)):
        for i, name in enumerate(names):
            if name not in fields:
                raise RecipeError(
                    f"selection.{key}: {recipe.name} has no field '{name}'.{did_you_mean(name, fields)} "
                    f"Fields: {listing(fields)}",
                    path=("selection", key, i),
                )
    planted = tuple(name for name in fields if name in (*recipe.data.planted, *block.planted))
    if both := [name for name in block.informative if name in planted]:
        raise RecipeError(
            f"selection.informative: '{both[0]}' is planted, so that it tells nothing",
            path=("selection", "informative"),
        )
    telling = block.informative or [name for name in fields if name not in planted]
    informative = tuple(name for name in fields if name in telling)
    overrides = (*overrides, *block.overrides)
    return Retraining(path, overrides, recipe, fields, planted, informative, tuple(counts), block.reference)


def check_search(name: str, recipe: Recipe, judged: Retraining) -> None:
    """Refuse a row of a selection table that ranks no fields, or others than the base has.

    Raises:
        RecipeError: with the row's name.
    """
    if recipe.parts["selector"].name == "keep_all":
        raise RecipeError(f"{name}: the recipe has no selector, so it ranks no fields", path=("rows",))
    if PRUNE not in [stage.name for stage in recipe.stages]:
        raise RecipeError(
            f"{name}: none of the recipe's stages is '{PRUNE}', which writes the scores of the fields", path=("rows",)
        )
    own = fields_of(recipe)
    for field, lacks, known in (
        *((field, recipe.name, own) for field in judged.fields if field not in own),
        *((field, judged.recipe.name, judged.fields) for field in own if field not in judged.fields),
    ):
        raise RecipeError(
            f"{name}: the row and selection.base have other fields: {lacks} has no '{field}'."
            f"{did_you_mean(field, known)}",
            path=("rows",),
        )


def search_stages(recipe: Recipe) -> list[dict[str, Any]]:
    """The stages of a recipe up to its first `prune`, as it writes them."""
    last = [stage.name for stage in recipe.stages].index(PRUNE)
    return [written(stage) for stage in recipe.stages[: last + 1]]
