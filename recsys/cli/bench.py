"""`recsys bench`: recipes × seeds as a table beside published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry, require
from recsys.cli.train import DataRootOption
from recsys.errors import RecsysError, RunError, did_you_mean, listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from recsys.bench.report import Line
    from recsys.bench.table import Bench, Entry


def command(
    table: Annotated[str, typer.Argument(help="Table file, or the name of one that comes with recsys.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the runs and the table go.")],
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Runs of each recipe; by default what the table says.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Only this row of the table; can be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at the same time.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of each run.")] = 1,
    data_root: DataRootOption = None,
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the table as one JSON object in the last line of stdout.")
    ] = False,
) -> None:
    """Train the recipes of a table with several seeds each, and print means beside the published values.

    `recsys bench tables/frappe --out runs/frappe --only fm --seeds 2 --data-root data`. Every run has a process, a
    folder and a log of its own. Called again, it repeats nothing that is finished and resumes what was stopped (Ctrl-C
    lets every run save first). Seeds come first: after a while, every recipe has one run, then two. The table is in
    `table.md`, `table.csv` and `table.json`, and always tells the runs that are finished. A table with a `plot:` is
    drawn too, into `plot.svg`, when the extra `report` is installed.
    """
    registry = open_registry(plugin, without)
    from recsys.bench.execute import Workers
    from recsys.bench.execute import jobs as jobs_of
    from recsys.bench.report import summarise, to_json, write
    from recsys.bench.table import read_table
    from recsys.recipe.check import find_recipe

    bench = read_table(find_recipe(table), registry, seeds)
    todo = [job for job in jobs_of(bench, out) if _wanted(job.entry, bench, only)]
    options = [] if data_root is None else ["--data-root", str(data_root.resolve())]
    options += [part for file in plugin or () for part in ("--plugin", str(file.resolve()))]
    options += [part for name in without or () for part in ("--without", name)]
    left = [job for job in todo if not job.done]
    console = make_console(stderr=as_json)
    console.print(f"{bench.name}: {len(todo)} runs, {len(todo) - len(left)} finished before", highlight=False)
    from recsys.train.progress import bar

    with bar(console) as progress:
        task = progress.add_task("runs", total=len(left))

        def tell(job: object, error: RunError | None) -> None:
            if error is not None:
                console.print(f"[red]{str(error).splitlines()[0]}[/red]")
            progress.advance(task)
            write(bench, summarise(bench, todo), out)

        failures = Workers(options, jobs, threads).run(left, tell)
    lines = summarise(bench, todo)
    write(bench, lines, out)
    _print(console, bench, [line for line in lines if line.runs])
    if bench.plot is not None:
        _draw(console, bench, lines, out)
    if as_json:
        print(json.dumps(to_json(bench, lines)))
    if failures:
        raise RunError("\n".join([f"{len(failures)} of {len(left)} runs failed", *map(str, failures)]))


def _wanted(entry: Entry, bench: Bench, only: Sequence[str] | None) -> bool:
    names = [e.name for e in bench.entries]
    for name in only or ():
        if name not in names:
            raise RunError(f"--only: no row '{name}'.{did_you_mean(name, names)} Rows: {listing(names)}")
    return not only or entry.name in only


def _draw(console: Console, bench: Bench, lines: Sequence[Line], out: Path) -> None:
    """Draw the finished rows of the table, or say what that needs."""
    try:
        require("report")
    except RecsysError as error:
        console.print(f"[yellow]no plot: {error}[/yellow]", highlight=False)
        return
    from recsys.bench.plots import draw

    if draw(bench, lines, out / "plot.svg"):
        console.print(f"{out / 'plot.svg'}", highlight=False)


def _print(console: Console, bench: Bench, lines: Sequence[Line]) -> None:
    from rich.table import Table

    from recsys.bench.report import cells

    header, rows = cells(bench, lines)
    shown = Table(*header, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
