"""A progress bar: rows per second and time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class RowsPerSecond(ProgressColumn):
    """Rows per second of the running task."""

    def render(self, task: Task) -> Text:
        """Return the speed as text."""
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "– rows/s", style="cyan")


def bar(console: Console, disable: bool = False) -> Progress:
    """Return a progress bar that counts rows."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RowsPerSecond(),
        TimeRemainingColumn(),
        console=console,
        disable=disable or not console.is_terminal,
        transient=True,
    )
