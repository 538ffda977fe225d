"""`recsys explain`: what the interactions of a trained run looked at."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry
from recsys.cli.train import DataRootOption
from recsys.errors import DataError, RecipeError, did_you_mean, listing

if TYPE_CHECKING:
    from rich.table import Table

    from recsys.contracts import Batch
    from recsys.data.blocks import EncodedColumns
    from recsys.data.shards import Shards
    from recsys.plugin.registry import Registry
    from recsys.recipe.check import Recipe
    from recsys.report.explain import Shown
    from recsys.train.run import Run


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")],
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="Whose rows: train, valid or test.")] = "test",
    rows: Annotated[int, typer.Option("--rows", min=2, help="Explain the first so many rows of the split.")] = 1024,
    top: Annotated[int, typer.Option("--top", min=1, help="Lines of each table.")] = 10,
    data_root: DataRootOption = None,
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as one JSON object.")] = False,
) -> None:
    """Show what the parts of a trained run looked at: importance, attention, crosses of fields.

    `recsys explain runs/mine --split test --rows 4096 --top 5`

    Each interaction says itself what there is to show; `recsys show NAME` describes it. Values of rows are averaged
    over the rows; where signs could cancel out, the mean of the absolute values stands beside the mean. The tables
    average over heads and neurons, `--json` keeps them apart. A dimension as long as there are fields is taken for
    the fields. Where a selector has looked for the fields that matter, its scores come first, also when it is pruned
    away.
    """
    registry = open_registry(plugin, without)
    from recsys.nn.model import Model
    from recsys.recipe.build import load_trained
    from recsys.report.explain import explain
    from recsys.train.stages import selector_scores

    console = make_console(stderr=as_json)
    recipe, trained, _ = load_trained(run, registry, console)
    batch, fewer = _first_rows(recipe, trained, registry, split, rows, data_root)
    names = Model.consumer_fields(trained.schema, trained.model.embedding).names
    shown, scores = explain(trained.model, batch, fewer), selector_scores(trained)
    if as_json:
        _print_json(run, split, len(batch), names, shown, scores)
        return
    if scores:
        console.print(_table_of_scores(scores, top))
    if not shown:
        console.print("the interactions of this run have nothing to show")
    for part, group in itertools.groupby(shown, key=lambda s: s.part):
        console.print(f"{part} · {split}, {len(batch):,} rows", highlight=False, markup=False)
        for table in _tables(list(group), names, top):
            console.print(table)


def _first_rows(
    recipe: Recipe, run: Run, registry: Registry, split: str, count: int, root: Path | None
) -> tuple[Batch, Batch]:
    """Return the first rows of a split, and about half of them."""
    from recsys.data.shards import write_blocks
    from recsys.data.split import split_rows
    from recsys.recipe.build import build_source, data_root

    source = build_source(recipe, registry, data_root(recipe, root))
    splits = split_rows(source, recipe.data.split, rows=recipe.data.batch_rows)
    if split not in splits:
        raise RecipeError(f"no split '{split}'.{did_you_mean(split, splits)} Splits: {listing(splits)}")
    schema = replace(run.schema, tasks=(), context=())  # inputs are all that is needed
    with tempfile.TemporaryDirectory() as temporary:
        blocks = _enough(run.encoder.transform(splits[split], labels=False), count)
        shards: Shards = write_blocks(schema, blocks, Path(temporary) / "rows")
        found = min(count, len(shards))
        if found < 2:
            raise DataError(f"split '{split}' has {found} row, at least 2 are needed")
        return shards.read(0, found), shards.read(0, found // 2)


def _enough(blocks: Iterator[EncodedColumns], count: int) -> Iterator[EncodedColumns]:
    """Yield blocks until they hold `count` rows."""
    seen = 0
    for block in blocks:
        yield block
        seen += block.rows
        if seen >= count:
            return


def _print_json(
    run: Path, split: str, rows: int, names: Sequence[str], shown: Sequence[Shown], scores: Mapping[str, float]
) -> None:
    import json

    parts: dict[str, dict[str, object]] = {}
    for s in shown:
        parts.setdefault(s.part, {})[s.name] = s.plain()
    told = {"run": str(run), "split": split, "rows": rows, "fields": list(names), "interactions": parts}
    print(json.dumps(told | ({"selector": dict(scores)} if scores else {})))


def _tables(group: Sequence[Shown], names: Sequence[str], top: int) -> Iterator[Table]:
    """Yield the tables of one interaction."""
    sets = [s for s in group if s.is_sets]
    beside = {s.name for s in group for t in sets if len(s.shape) == 1 and s.shape[0] == t.shape[0] and not any(s.axes)}
    for s in group:
        if s.is_sets:
            values = [o for o in group if o.name in beside and o.shape[0] == s.shape[0]]
            yield _table_of_sets(s, values, names, top)
        elif s.over_fields:
            yield _table_of_fields(s, names, top)
        elif s.mean.dim() <= 1 and s.name not in beside:
            yield _table_of_numbers(s)


def _table_of_scores(scores: Mapping[str, float], top: int) -> Table:
    table = _table("selector", ["field", "score"])
    for name, score in sorted(scores.items(), key=lambda item: -item[1])[:top]:
        table.add_row(name, _number(score))
    return table


def _table_of_fields(s: Shown, names: Sequence[str], top: int) -> Table:
    mean, size = s.folded()
    columns = ["field", "looks at"] if s.over_fields == 2 else ["field"]
    table = _table(s.name, [*columns, "mean", "mean |·|"] if s.signed else [*columns, "mean"])
    for place in size.flatten().argsort(descending=True, stable=True)[:top].tolist():
        index = divmod(place, len(names)) if s.over_fields == 2 else (place,)
        numbers = [mean.flatten()[place], size.flatten()[place]][: 2 if s.signed else 1]
        table.add_row(*(names[i] for i in index), *(_number(float(n)) for n in numbers))
    return table


def _table_of_sets(s: Shown, values: Sequence[Shown], names: Sequence[str], top: int) -> Table:
    from recsys.report.explain import names_of_sets

    table = _table(s.name, ["fields", *(v.name for v in values)])
    for i, members in enumerate(names_of_sets(s, names)[:top]):
        told = f"all {len(members)}" if len(members) == len(names) > 1 else ", ".join(members) or "none"
        table.add_row(told, *(_number(float(v.mean[i])) for v in values))
    return table


def _table_of_numbers(s: Shown) -> Table:
    table = _table(s.name, ["", "value"])
    if s.mean.dim() == 0:
        table.add_row("", _number(float(s.mean)))
    else:
        for i in s.mean.nonzero().flatten().tolist():
            table.add_row(str(i), _number(float(s.mean[i])))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if column in ("field", "looks at", "fields") or i == 0 else "right")
    return table


def _number(value: float) -> str:
    return f"{value:.4g}"
