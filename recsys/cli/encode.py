"""`recsys encode`: encode a recipe's data ahead of training, or build its histories from a time-ordered log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry
from recsys.cli.train import DataRootOption
from recsys.errors import DataError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from recsys.data.history_files import HistorySpec
    from recsys.plugin.registry import Registry
    from recsys.recipe.check import Recipe


def command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that comes with recsys.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as `data.batch_rows=10000`.")
    ] = None,
    history: Annotated[
        str | None,
        typer.Option("--history", metavar="USER", help="Build histories instead: this column says whose they are."),
    ] = None,
    time_column: Annotated[
        str | None, typer.Option("--time", metavar="TIME", help="With --history: the column that orders the rows.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="With --history: new folder, or FILE.parquet, for the logs."),
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(
            "--events",
            metavar="RULE",
            help="With --history: rows that are events, as COLUMN, COLUMN=VALUE or COLUMN>=NUMBER; by default all.",
        ),
    ] = None,
    sort: Annotated[
        bool,
        typer.Option("--sort", help="With --history: take rows in any order; holds all events in memory."),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Compare every byte with what was encoded before; refuse columns that the recipe lacks."
        ),
    ] = False,
    data_root: DataRootOption = None,
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object in the last line of stdout.")
    ] = False,
) -> None:
    """Encode a recipe's data into the cache, where `recsys train` finds it; or build its histories.

    `recsys encode mine.yaml` prints what encoding met and what the encoded rows take on disk.

    `recsys encode mine.yaml --history user --time ts --out with_history` writes the recipe's raw logs again, rows
    and order kept, with the list columns that its `sequences:` names: of every row, the earlier events of its user,
    oldest first. Rows of equal time never see each other. `--events click` counts only rows with a click as events.
    """
    registry = open_registry(plugin, without)
    from recsys.recipe.check import find_recipe, load_recipe

    checked = load_recipe(find_recipe(recipe), registry, overrides or ())
    console = make_console(stderr=as_json)
    if history is None:
        if time_column is not None or out is not None or events is not None or sort:
            raise RecipeError("--time, --out, --events and --sort belong to --history")
        result = _encode(checked, registry, data_root, console, strict)
    else:
        if strict:
            raise RecipeError("--strict is for encoding, without --history")
        if time_column is None or out is None:
            raise RecipeError("--history needs --time COLUMN and --out PATH beside it")
        from recsys.data.history_files import HistorySpec

        spec = HistorySpec(history, time_column, events, sort)
        result = _history(checked, registry, spec, out, data_root, console)
    if as_json:
        print(json.dumps(result))


def _encode(recipe: Recipe, registry: Registry, root: Path | None, console: Console, strict: bool) -> dict[str, Any]:
    from recsys.data.sources import Identified
    from recsys.recipe.build import build_source, data_root, prepare_data
    from recsys.train.distributed import World

    source = build_source(recipe, registry, data_root(recipe, root))
    if not isinstance(source, Identified):
        raise DataError(
            f"data.source: {recipe.data.source.get('use')!r} has no `identity()`, so what is encoded now could not be "
            "used again"
        )
    started, begun = time.perf_counter(), time.time()
    prepared = prepare_data(recipe, source, console, World(), strict=strict)
    seconds = time.perf_counter() - started
    reused = (prepared.folder / "encoder" / "encoder.json").stat().st_mtime < begun
    rows = {name: len(shards) for name, shards in prepared.splits.items()}
    size = _bytes(prepared.folder)
    encoded = sum(_bytes(prepared.folder / name) for name in rows)
    total = sum(rows.values())
    _say(console, str(prepared.report))
    _say(console, f"folder  {prepared.folder}{' (encoded before)' if reused else ''}")
    _say(console, f"disk    {size:,} bytes, {encoded / total:,.1f} per row")
    if not reused:
        _say(console, f"speed   {total / seconds:,.0f} rows/s")
    return {
        "folder": str(prepared.folder),
        "fingerprint": prepared.fingerprint,
        "reused": reused,
        "rows": rows,
        "bytes": size,
        "bytes_per_row": round(encoded / total, 3),
        "seconds": round(seconds, 3),
        "rows_per_second": None if reused else round(total / seconds, 1),
        "report": prepared.report.to_json(),
    }


def _history(
    recipe: Recipe, registry: Registry, spec: HistorySpec, out: Path, root: Path | None, console: Console
) -> dict[str, Any]:
    from recsys.data.history_files import write_history
    from recsys.recipe.build import build_source, data_root
    from recsys.train.progress import bar

    source = build_source(recipe, registry, data_root(recipe, root))
    started = time.perf_counter()
    with bar(console) as progress:
        task = progress.add_task("reading the data", total=None)
        written = write_history(
            source,
            recipe.data,
            spec,
            out,
            keep=_own_columns(recipe, registry, root),
            progress=lambda what, rows: progress.update(task, description=what, completed=rows),
        )
    seconds = time.perf_counter() - started
    total = sum(written.rows.values())
    changes = _changes(recipe, {name: path.resolve() for name, path in written.paths.items()})
    size = sum(_bytes(path) for path in written.paths.values())
    for name, count in written.lengths.items():
        _say(console, f"{name}: {count:,} events, {count / total:,.1f} per row")
    if not written.events:
        _say(console, f"warning: no row is an event ({spec.events}); every history is empty")
    _say(console, f"rows    {total:,}, {written.events:,} of them events, of {written.users:,} users")
    _say(console, f"out     {out}, {size:,} bytes")
    _say(console, f"speed   {total / seconds:,.0f} rows/s, {written.held:,} bytes held for the users' events")
    _say(console, "next    recsys train RECIPE " + " ".join(changes))
    return {
        "out": str(out),
        "rows": dict(written.rows),
        "events": written.events,
        "users": written.users,
        "lengths": dict(written.lengths),
        "bytes": size,
        "held_bytes": written.held,
        "seconds": round(seconds, 3),
        "rows_per_second": round(total / seconds, 1),
        "overrides": changes,
    }


def _own_columns(recipe: Recipe, registry: Registry, root: Path | None) -> list[str] | None:
    """Return the columns of the logs without those of joined side tables, which training joins again."""
    from dataclasses import replace

    from recsys.data.history_files import undivided
    from recsys.recipe.build import build_source, data_root

    spec = recipe.data.source
    if spec.get("use") != "files" or not spec.get("join"):
        return None
    bare = {key: value for key, value in spec.items() if key != "join"}
    alone = recipe.data.model_copy(update={"source": bare})
    source = build_source(replace(recipe, data=alone), registry, data_root(recipe, root))
    frame = next(iter(undivided(source, recipe.data).values()))
    return frame.collect_schema().names()


def _changes(recipe: Recipe, paths: dict[str, Path]) -> list[str]:
    """Return the overrides with which the recipe reads what was written."""
    keys = {"path" if name == "all" else name: path for name, path in paths.items()}
    if recipe.data.source.get("use") != "files":
        inside = ", ".join(f"{key}: {json.dumps(str(path))}" for key, path in keys.items())
        return [f"data.source={{use: files, {inside}}}"]
    changes = [f"data.source.{key}={path}" for key, path in keys.items()]
    return changes + (["data.source.format=parquet"] if recipe.data.source.get("format") else [])


def _bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
