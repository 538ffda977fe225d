"""`recsys check`: everything about a recipe and its data that can be known before it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry
from recsys.cli.train import DataRootOption

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from recsys.contracts import EncodedSchema
    from recsys.data.doctor import Progress
    from recsys.data.doctor_facts import ColumnFacts, Examination, Limits
    from recsys.recipe.check import Recipe
    from recsys.recipe.describe import Dry, Memory

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|LOGS", help="Recipe file, or the name of one that comes with recsys; or a file of logs."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as `train.epochs=2`; or more files of logs."),
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Rows of each split to examine, and to learn the sizes from.")
    ] = 1_000_000,
    leak_auc: Annotated[
        float, typer.Option("--leak-auc", min=0.5, max=1, help="Warn of an input that alone has a higher AUC.")
    ] = 0.99,
    max_duplicates: Annotated[
        float,
        typer.Option(
            "--max-duplicates", min=0, max=1, help="Error when a larger share of a split's rows is in train too."
        ),
    ] = 1.0,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    data_root: DataRootOption = None,
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a recipe and its data without training; the exit status is 1 when there are errors.

    Of the recipe: keys, options, columns, shapes, parameters, memory and cost of a step. Of the data: labels, times,
    missing and unknown values, constants, row ids, copies within and across splits, leaks, drift.

    `recsys check recipes/frappe/dcnv2.yaml --data-root data`; logs without a recipe: `recsys check 'logs/*.parquet'`
    """
    from recsys.data.doctor_facts import Limits

    limits = Limits(leak=leak_auc, duplicates=max_duplicates)
    if _is_logs(recipe):
        found = _logs([recipe, *(overrides or ())], rows, limits, as_json)
    else:
        registry = open_registry(plugin, without)
        from recsys.data.doctor import examine
        from recsys.recipe.check import find_recipe, load_recipe
        from recsys.recipe.describe import dry_run, expected_memory

        checked = load_recipe(find_recipe(recipe), registry, overrides or ())
        with _progress() as tell:
            tell("learn the sizes", 0)
            dry = dry_run(checked, registry, data_root, rows)
            found = examine(dry.rows_of, checked.data, dry.encoder, rows=rows, limits=limits, progress=tell)
        sizes = {name: split.rows for name, split in found.splits.items()}
        memory = expected_memory(checked, dry, sizes, found.events)
        if as_json:
            print(json.dumps({"recipe": _recipe_json(checked, dry, memory), **found.to_json()}, indent=2))
        else:
            console = make_console()
            _print_examination(console, found, dry.schema, checked.data.planted)
            _print_recipe(console, checked, dry, memory)
            _print_findings(console, found)
    if found.count("error") or (strict and found.count("warning")):
        raise typer.Exit(1)


def _is_logs(name: str) -> bool:
    """Whether the argument stands for files of logs: by its ending, as a glob, an address or a folder."""
    from recsys.data.formats import SUFFIXES, is_remote
    from recsys.errors import RecipeError

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return False
    if is_remote(name) or path.suffix.lower() in SUFFIXES or any(c in name for c in "*?["):
        return True
    if not path.is_dir():
        return False
    from recsys.recipe.check import find_recipe

    try:
        find_recipe(name)
    except RecipeError:
        return True
    return False


def _logs(paths: Sequence[str], rows: int, limits: Limits, as_json: bool) -> Examination:
    from recsys.data.doctor import examine_logs

    with _progress() as tell:
        found, encoder = examine_logs(paths, rows=rows, limits=limits, progress=tell)
    if as_json:
        print(json.dumps({"recipe": None, **found.to_json()}, indent=2))
    else:
        console = make_console()
        _print_examination(console, found, None if encoder is None else encoder.schema)
        _print_findings(console, found)
    return found


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show what is being read and how many rows, on a terminal."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = make_console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda what, done: shown.update(task, description=what, completed=done)


def _recipe_json(recipe: Recipe, dry: Dry, memory: Memory) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "shapes": {name: list(shape) for name, shape in dry.shapes.items()},
        "parameters": sum(p.numel() for p in dry.model.parameters()),
        "flops_per_row": dry.flops,
        "sizes_from_rows": dry.rows,
        "memory_bytes": asdict(memory),
        "stages": [stage.options.get("name") or stage.name for stage in recipe.stages],
    }


def _table(*header: str) -> Table:
    from rich.table import Table

    return Table(*header, box=None, pad_edge=False)


def _print_examination(
    console: Console, found: Examination, schema: EncodedSchema | None, planted: Sequence[str] = ()
) -> None:
    from rich.markup import escape

    tasks = list(dict.fromkeys(task for split in found.splits.values() for task in split.positives))
    times = list(dict.fromkeys(column for split in found.splits.values() for column in split.times))
    table = _table("split", "rows", *(f"{escape(t)} positive" for t in tasks), *(escape(t) for t in times))
    for name, split in found.splits.items():
        known = split.positives if split.examined else {}
        cells = [f"{known[t] / split.examined:.3%}" if t in known else "–" for t in tasks]
        for column in times:
            time = split.times[column]
            cells.append(f"{time.shown(time.low)} to {time.shown(time.high)}")
        table.add_row(name, f"{split.rows:,}", *cells)
    console.print(table)
    part = [split.examined for split in found.splits.values() if split.examined < split.rows]
    what = f"the first {found.limit:,} rows of each split" if part else "all rows"
    console.print(f"examined: {what}\n", highlight=False, soft_wrap=True)

    splits = " / ".join(found.splits)
    header = ("input", "kind", "type", "distinct", "ids", f"missing % {splits}", f"unknown % {splits}", "AUC alone")
    table = _table(*header)
    kinds = _kinds(schema)
    for name, facts in found.columns.items():
        distinct = f"{facts.distinct:,}" if facts.exact else f"about {facts.distinct:,}"
        cells = [name, kinds.get(name, facts.role), facts.type, distinct, _ids(facts)]
        cells += [_rates(found, facts.null), _rates(found, facts.unknown), _aucs(found, name)]
        table.add_row(*map(escape, cells))
    inputs = {name for aucs in found.aucs.values() for name in aucs}
    for name in sorted(inputs - set(found.columns) - set(planted)):
        table.add_row(escape(name), "list", "", "", "", "", "", _aucs(found, name))
    sizes = {} if schema is None else {f.name: f"{f.rows:,}" for f in schema.fields if not f.numeric}
    for name in planted:
        table.add_row(escape(name), "noise", "", "", sizes.get(name, ""), "", "", _aucs(found, name))
    console.print(table)
    _print_duplicates(console, found)


def _kinds(schema: EncodedSchema | None) -> Mapping[str, str]:
    """Return column → what it is, for lists and for fields that use the ids of another."""
    if schema is None:
        return {}
    kinds = {f.name: f"categorical, shares {f.shares}" for f in schema.fields if f.shares}
    for history in schema.histories:
        kind = f"history of {', '.join(history.target)}" if history.target else "multi-valued"
        kinds |= {
            c.name: f"{kind}, at most {history.max_length}{f', shares {c.shares}' if c.shares else ''}"
            for c in history.columns
        }
    return kinds


def _ids(column: ColumnFacts) -> str:
    return "" if column.ids is None else f"{column.ids:,}"


def _rates(found: Examination, rates: Mapping[str, float]) -> str:
    return " / ".join(f"{100 * rates[s]:.2f}" if s in rates else "–" for s in found.splits) if rates else ""


def _aucs(found: Examination, name: str) -> str:
    shown = [aucs[name] for aucs in found.aucs.values() if name in aucs]
    return " / ".join("–" if math.isnan(auc) else f"{auc:.3f}" for auc in shown)


def _print_duplicates(console: Console, found: Examination) -> None:
    if found.duplicates is None:
        return
    table = _table("equal rows", "compared", "inputs and labels", "inputs alone")
    pairs = {f"within {split}": repeated for split, repeated in found.duplicates.within.items()}
    pairs |= {f"{later} also in {earlier}": r for (later, earlier), r in found.duplicates.across.items()}
    for name, repeated in pairs.items():
        shares = [f"{n:,} ({n / max(repeated.rows, 1):.2%})" for n in (repeated.whole, repeated.inputs)]
        table.add_row(name, f"{repeated.rows:,}", *shares)
    console.print()
    console.print(table)
    if not found.duplicates.exact:
        console.print("numbers of equal rows are scaled up from a sample of rows that their hash chose")


def _print_recipe(console: Console, recipe: Recipe, dry: Dry, memory: Memory) -> None:
    steps = " → ".join(f"{name} [{', '.join(shape)}]" for name, shape in dry.shapes.items())
    console.print(f"\nshapes: {steps} → logit [B]", highlight=False, markup=False, soft_wrap=True)
    count = sum(p.numel() for p in dry.model.parameters())
    tables = sum(p.numel() for p in dry.model.parameter_groups()[0])
    batch = recipe.train.batch_size
    console.print(f"parameters: {count:,} ({tables:,} in tables)", highlight=False, soft_wrap=True)
    console.print(
        f"memory: tables {_size(memory.tables)}, network {_size(memory.network)}, "
        f"gradients {_size(memory.gradients)}, {recipe.train.optimizer} {_size(memory.optimizer)}, "
        f"batch of {batch:,} rows {_size(memory.batch)}; activations come on top",
        highlight=False,
        soft_wrap=True,
    )
    encoded = ", ".join(f"{name} {_size(size)}" for name, size in memory.encoded.items())
    console.print(f"encoded on disk: {encoded}", highlight=False, soft_wrap=True)
    step = 3 * dry.flops * batch / 1e9
    cost = f"cost: {dry.flops / 1e6:,.2f} MFLOP per row forward, about {step:,.1f} GFLOP per step of {batch:,} rows"
    console.print(cost, highlight=False, soft_wrap=True)
    stages = ", ".join(stage.options.get("name") or stage.name for stage in recipe.stages)
    console.print(f"splits: {', '.join(dry.splits)} · stages: {stages}", highlight=False, soft_wrap=True)
    console.print(
        f"the recipe is sound; sizes are those of the first {dry.rows:,} training rows", highlight=False, soft_wrap=True
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _print_findings(console: Console, found: Examination) -> None:
    from rich.markup import escape

    from recsys.data.doctor_facts import SEVERITIES

    console.print()
    if found.findings:
        table = _table("severity", "code", "column", "split", "what, and what to do")
        for finding in found.findings:
            severity = f"[{_STYLES[finding.severity]}]{finding.severity}[/]"
            rest = (finding.code, finding.column or "", finding.split or "", finding.message)
            table.add_row(severity, *map(escape, rest))
        console.print(table)
    counts = ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s in SEVERITIES if (n := found.count(s)))
    console.print(f"data: {counts or 'nothing to report'}", highlight=False)
