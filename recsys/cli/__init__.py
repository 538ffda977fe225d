"""The command line, one file per command; nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys

import typer

from recsys.cli import (
    bench,
    check,
    encode,
    evaluate,
    explain,
    export,
    list,
    new_plugin,
    plugins,
    predict,
    schema,
    serve,
    show,
    simulate,
    train,
    verify,
)
from recsys.errors import RecsysError

app = typer.Typer(
    name="recsys",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Train, compare, shrink and serve recommender and click-through-rate models.\n\n"
        "Start with `recsys train quickstart`; then `recsys schema infer logs.parquet` writes the data part "
        "of a recipe for your own logs, and `recsys list` shows what a recipe can use."
    ),
)
app.command("train", help=train.command.__doc__)(train.command)
app.command("check", help=check.command.__doc__)(check.command)
app.command("encode", help=encode.command.__doc__)(encode.command)
app.command("evaluate", help=evaluate.command.__doc__)(evaluate.command)
app.command("bench", help=bench.command.__doc__)(bench.command)
app.command("explain", help=explain.command.__doc__)(explain.command)
app.command("predict", help=predict.command.__doc__)(predict.command)
app.command("verify", help=verify.command.__doc__)(verify.command)
app.command("export", help=export.command.__doc__)(export.command)
app.command("serve", help=serve.command.__doc__)(serve.command)
app.command("list", help=list.command.__doc__)(list.command)
app.command("show", help=show.command.__doc__)(show.command)
app.command("plugins", help=plugins.command.__doc__)(plugins.command)
app.command("new-plugin", help=new_plugin.command.__doc__)(new_plugin.command)
app.add_typer(schema.app, name="schema")
app.command("simulate", help=simulate.command.__doc__)(simulate.command)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from recsys import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command; what the user can fix (a full disk too) is printed as one message, with exit status 1."""
    try:
        app()
    except RecsysError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
