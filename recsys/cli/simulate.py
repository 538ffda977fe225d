"""`recsys simulate`: a click log whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.errors import DataError

if TYPE_CHECKING:
    from recsys.data.simulate_world import World


def command(
    rows: Annotated[
        str, typer.Option(metavar="N|A:B", help="How many rows; or only the rows A to B-1 of a log of --total rows.")
    ] = "100000",
    seed: Annotated[int, typer.Option(min=0, help="Of the world and of every draw; same seed, same bytes.")] = 7,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for log/, truth/ and manifest.json.")] = Path(
        "simulated"
    ),
    preset: Annotated[str, typer.Option(metavar="WORLD", help="Which world; see above.")] = "quickstart",
    users: Annotated[int | None, typer.Option(min=1, help="Number of users, in place of the world's own.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Number of items, in place of the world's own.")] = None,
    fields: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=180,
            help="Put so many plain fields (user, item, context, noise in turn) in place of the world's own.",
        ),
    ] = None,
    randomised: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of rows (of requests, in lists) that no policy had a hand in."),
    ] = None,
    clicks_only: Annotated[
        bool, typer.Option("--clicks-only", help="Leave out the rows without a click; for worlds with conversions.")
    ] = False,
    uniform: Annotated[
        bool | None,
        typer.Option(
            "--uniform/--no-uniform",
            help="Write uniform/ too; by default in every world whose log is not what users think of items.",
        ),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Print what each field is worth, and what it seems to be worth in the log.")
    ] = False,
    score: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write nothing: compare this file's row_id and score with the truth in --out, row by row.",
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(metavar="ROWS", help="Rows that --score is about: uniform or log.")
    ] = "uniform",
    by_day: Annotated[
        bool, typer.Option("--by-day", help="With --score, also the excess log loss of every day.")
    ] = False,
    total: Annotated[int | None, typer.Option(min=1, help="Rows of the whole log, with --rows A:B.")] = None,
) -> None:
    """Write a click log with planted structure to Parquet, and the truth about each row beside it.

    `recsys simulate --rows 1000000 --seed 7 --out sim` writes `sim/log/` (what a real log would hold) and
    `sim/truth/` (the probability that drew each label), and prints the best AUC that any model can reach on it.
    Compare a model's AUC with that one, not with 1.

    Worlds (--preset), each with a fault that a method must mend; a recipe reads them with
    `source: {use: simulated, preset: WORLD}`:

    quickstart     everything is shown; much of the signal is in interactions
    easy           exposure follows popularity, not relevance
    mnar           exposure follows relevance and, strongly, popularity
    popular        exposure follows popularity; what is liked is a matter of taste
    confounded     exposure and click share a trait that is not logged
    drift          tastes turn, and popularity jumps at half time
    slate-plain    lists of ten, the k-th place looked at with probability 1/k
    slate-pbm      lists of ten, examined by place and device
    slate-cascade  lists of ten, looked through until a click satisfies
    delayed        clicks and conversions; late ones are not known yet
    conversion     few clicks, of rows that convert more easily than others
    flip20         a fifth of the clicks is recorded as none
    pooled         only what an old retriever ranks high is judged
    fair           a sensitive attribute leaks into tastes and exposure
    leaky          one field is the label with a few errors

    Columns that a debiasing loss reads stand in the log under plain names (observed, propensity, popularity,
    uniform, attribute, request, position, click, conversion, delay, elapsed), to be named under `data.context`.
    `sim/uniform/` holds rows on which everything was shown, examined, judged, recorded rightly and waited for:
    test on these what was trained on the log. Nothing but a scorer should read `sim/truth/`.

    `--values` tells which fields a selector should keep. Predictions of any model are compared with the truth, free of
    the noise that labels have:

    recsys predict runs/mine --data 'sim/uniform/*.parquet' --out scores.parquet --keep row_id
    recsys simulate --score scores.parquet --out sim

    Rows are a function of seed and row number: `--rows 0:500000 --total 1000000` and `--rows 500000:1000000
    --total 1000000`, run side by side, write the very rows that one run would.
    """
    if score is not None:
        _compare(score, out, against, by_day)
        return
    start, stop = parse_rows(rows, total)
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from recsys.data.simulate_presets import make_config
    from recsys.data.simulate_world import World
    from recsys.data.simulate_write import uniform_from, write

    config = make_config(
        preset,
        rows=total or stop,
        seed=seed,
        users=users,
        items=items,
        fields=fields,
        randomised=randomised,
        clicks_only=clicks_only,
    )
    uniform = config.selective if uniform is None else uniform
    first = max(start, uniform_from(config)) if uniform else stop
    drawn = stop - start + stop - first
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("building the world", total=drawn)
        world = World(config)
        progress.update(task, description="drawing rows")
        begin = time.perf_counter()
        written = write(world, out, start, stop, lambda rows: progress.advance(task, rows), uniform=uniform)
        seconds = time.perf_counter() - begin
    print(f"rows               {written.rows:,} in {out / 'log'}, {len(config.fields) + 2} fields, label y")
    if first < stop:
        print(f"uniform slice      {stop - first:,} rows in {out / 'uniform'}")
    print(f"rate of y          {written.click_rate:.4f}")
    print(f"best possible AUC  {written.best_auc:.4f}")
    print(f"speed              {drawn / seconds:,.0f} rows/s")
    if values:
        _print_values(world)
    print(f"next               recsys schema infer '{out / 'log' / '*.parquet'}'")


def _compare(predictions: Path, simulated: Path, against: str, by_day: bool) -> None:
    """Print how far predictions are from the truth."""
    from recsys.data.simulate_score import excess_by_day, score_file

    found = score_file(predictions, simulated, against)
    print(f"rows               {found.rows:,} of {simulated / against}")
    print(f"excess log loss    {found.excess:.5f}   (nats above the least possible; 0 is the truth)")
    print(f"expected AUC       {found.auc:.4f}")
    print(f"best possible AUC  {found.best_auc:.4f}")
    if by_day:
        print("day      rows   excess")
        for day, rows, excess, se in excess_by_day(predictions, simulated, against).rows():
            print(f"{day:3} {rows:9,}  {excess:.5f} ± {se:.5f}")


def _print_values(world: World) -> None:
    """Print what the fields of a world are worth, in thousandths of a nat."""
    from recsys.data.simulate_value import field_values

    found = field_values(world)
    names = [name.replace("segment_", "segm. ") for name in found.columns]
    print("worth of fields, in thousandths of a nat of log loss: `value` is lost when the field alone is hidden,")
    print("over all users and in each segment; `uniform` and `log` is what it tells by itself, there")
    for row in [names, *found.rows()]:
        cells = [f"{1000 * cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row[2:]]
        print(f"{row[0]:18} {row[1]:8}" + "".join(f"{cell:>9}" for cell in cells))


def parse_rows(rows: str, total: int | None) -> tuple[int, int]:
    """Return first row and row after the last one of `N` or `A:B`.

    Raises:
        DataError: neither of the two, an empty range, or a range of a log of unknown length.
    """
    first, colon, last = rows.partition(":")
    try:
        start, stop = (int(first), int(last)) if colon else (0, int(first))
    except ValueError:
        raise DataError(f"--rows {rows}: expected a number such as 1000000, or a range such as 0:500000") from None
    if not 0 <= start < stop:
        raise DataError(f"--rows {rows}: no rows in that range")
    if total is None and colon:
        raise DataError(f"--rows {rows}: say with --total how many rows the whole log has; time runs over all of them")
    if total is not None and stop > total:
        raise DataError(f"--rows {rows}: the whole log has {total} rows")
    return start, stop
