"""Errors that a user can act on: what is wrong, where, and the nearest thing that would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class RecsysError(Exception):
    """Base of every error that is the user's to fix; the CLI prints its text without a traceback."""


class RecipeError(RecsysError):
    """A recipe (or an override on the command line) that cannot be run.

    Args:
        message: what is wrong and what would be right.
        path: keys and list positions from the recipe's root to the wrong value, from which the reader of
            the recipe finds the file and the line; empty when the error is about no single value.
    """

    def __init__(self, message: str, *, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


class DataError(RecsysError):
    """Logs, columns or values that cannot be used as the recipe says."""


class PluginError(RecsysError):
    """A plugin that is missing, broken, or clashes with another one."""


class RunError(RecsysError):
    """A run folder that is missing, incomplete or does not fit what is asked of it."""


class BundleError(RecsysError):
    """A bundle that is damaged, altered, unsafe or of another version, or gives other answers than its golden ones."""


class ExportError(RecsysError):
    """A bundle or a run that cannot be written in the form that is asked for."""


class RequestError(RecsysError):
    """Rows to be scored that the model cannot read; the text begins with the address.

    Args:
        problem: what is wrong and what would be right.
        row: number of the row, from 1; None when the error is about all of them.
        column: the column, where one is to blame.
    """

    def __init__(self, problem: str, *, row: int | None = None, column: str | None = None) -> None:
        address = [] if row is None else [f"row {row}"]
        address += [] if column is None else [f"column {column!r}"]
        super().__init__(f"{', '.join(address)}: {problem}" if address else problem)
        self.problem = problem
        self.row = row
        self.column = column

    def after(self, rows: int) -> RequestError:
        """Return the same error for rows that have so many others before them."""
        if self.row is None or not rows:
            return self
        return RequestError(self.problem, row=self.row + rows, column=self.column)


class NonFiniteError(RecsysError):
    """A loss or gradient that is NaN or infinite; training stopped before it could reach the weights."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def listing(names: Sequence[str] | Iterable[str], limit: int = 30) -> str:
    """Join names for a message, shortened past `limit`."""
    names = list(names)
    tail = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + tail if names else "none"


def if_file(path: Path) -> str:
    """Say why a file is not taken where a folder is expected; empty where it is none."""
    if not path.is_file():
        return ""
    return (
        " It is a file; expected the folder of a run or a bundle, whose weights are safetensors (weights only): "
        "a pickle, such as a .ckpt or .pt, is never read."
    )
