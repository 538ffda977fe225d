"""`recsys plugins`: what is installed, and what of it works."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry

if TYPE_CHECKING:
    from recsys.plugin.loading import Candidate


def command(
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the installed plugins: distribution, version, components, load time, and whether each one works.

    Leave one out for a moment with `recsys plugins --without NAME`, or for good with `RECSYS_DISABLE=NAME`;
    let only some in with `RECSYS_PLUGINS_ALLOW=NAME,OTHER==1.2`. All three act before the plugin is imported.
    """
    registry = open_registry(plugin, without)
    rows = [_row(p, "loaded", p.seconds, [f"{c.kind} {c.name}" for c in p.components]) for p in registry.plugins]
    rows += [_row(p, "broken", p.seconds, reason=p.reason) for p in registry.broken]
    rows += [_row(p, "disabled", 0.0, reason=p.reason) for p in registry.disabled]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)


def _row(
    plugin: Candidate, state: str, seconds: float, components: Sequence[str] = (), reason: str = ""
) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "components": list(components),
        "seconds": round(seconds, 4),
        "state": state,
        "reason": reason,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = make_console()
    table = Table("plugin", "from", "version", "load s", "state", "components", box=None, pad_edge=False)
    colours = {"loaded": "green", "broken": "red", "disabled": "yellow"}
    for row in rows:
        state = f"[{colours[row['state']]}]{row['state']}[/]"
        names = escape(", ".join(row["components"]))
        table.add_row(
            escape(row["name"]), escape(row["distribution"]), row["version"], f"{row['seconds']:.2f}", state, names
        )
    console.print(table)
    for row in rows:
        if row["reason"]:
            console.print(f"{escape(row['name'])} is {row['state']}: {escape(row['reason'])}", style="yellow")
