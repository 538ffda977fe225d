"""`recsys bench`: recipes × seeds as a table beside published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry, require
from recsys.cli.train import DataRootOption
from recsys.errors import RecsysError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from recsys.bench.execute import Workers
    from recsys.bench.study import Study


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
    and SIGTERM let every run save first). Seeds come first: after a while, every recipe has one run, then two. The
    table is in `table.md`, `table.csv` and `table.json`, and always tells the runs that are finished. A table with a
    `plot:` is drawn too, into `plot.svg`, when the extra `report` is installed.

    A table with a `selection:` compares rankings of fields: every row's recipe runs up to its first `prune`, then the
    base is trained with the best fields of each ranking, every set once. It draws `curves.svg` and `cost.svg`.
    """
    registry = open_registry(plugin, without)
    from recsys.bench.execute import Workers
    from recsys.bench.study import study
    from recsys.bench.table import read_table
    from recsys.recipe.check import find_recipe

    bench = read_table(find_recipe(table), registry, seeds)
    running = study(bench, out, only)
    options = [] if data_root is None else ["--data-root", str(data_root.resolve())]
    options += [part for file in plugin or () for part in ("--plugin", str(file.resolve()))]
    options += [part for name in without or () for part in ("--without", name)]
    console = make_console(stderr=as_json)
    failures = _run(running, Workers(options, jobs, threads), console)
    running.write()
    for header, rows in running.cells():
        _print(console, header, rows)
    if running.pictured():
        _draw(console, running)
    if as_json:
        print(json.dumps(running.to_json()))
    if failures:
        raise RunError("\n".join(map(str, failures)))


def _run(running: Study, workers: Workers, console: Console) -> list[RunError]:
    """Run what is not finished; returns what to say of what failed, first of all how much."""
    from recsys.train.progress import bar

    failures: list[RunError] = []
    total = 0
    with bar(console) as progress:
        task = progress.add_task("runs", total=0)

        def tell(job: object, error: RunError | None) -> None:
            if error is not None:
                console.print(f"[red]{str(error).splitlines()[0]}[/red]")
            progress.advance(task)
            running.write()

        for wave in running.waves():
            left = [job for job in wave.jobs if not job.done]
            done = len(wave.jobs) - len(left)
            console.print(f"{wave.title}: {len(wave.jobs)} runs, {done} finished before", highlight=False)
            total += len(left)
            progress.update(task, total=total)
            failures += workers.run(left, tell)
    failed = [RunError(f"{len(failures)} of {total} runs failed")] if failures else []
    return [*failed, *failures, *running.problems]


def _draw(console: Console, running: Study) -> None:
    """Draw the finished rows of the table, or say what that needs."""
    try:
        require("report")
    except RecsysError as error:
        console.print(f"[yellow]no plot: {error}[/yellow]", highlight=False)
        return
    for path in running.draw():
        console.print(str(path), highlight=False)


def _print(console: Console, header: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    shown = Table(*header, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
