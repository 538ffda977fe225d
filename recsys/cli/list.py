"""`recsys list`: the components that recipes can use."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from recsys.cli.extras import PluginFiles, Without, make_console, open_registry


def command(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, for example `interaction`.")] = None,
    plugin: PluginFiles = None,
    without: Without = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the components that recipes can use: name, what it is, and which distribution brings it.

    `recsys list interaction` lists the interactions; `recsys show autoint` tells all about one of them.
    """
    registry = open_registry(plugin, without)
    from recsys.errors import RecsysError, did_you_mean, listing
    from recsys.plugin.hooks import KINDS

    if kind is not None and kind not in KINDS:
        raise RecsysError(f"unknown kind '{kind}'.{did_you_mean(kind, KINDS)} Kinds: {listing(KINDS)}")
    entries = [entry for entry in registry.all() if kind in (None, entry.component.kind)]
    if as_json:
        rows = [
            {
                "kind": entry.component.kind,
                "name": entry.component.name,
                "summary": entry.doc.summary,
                "distribution": entry.distribution,
                "version": entry.version,
            }
            for entry in entries
        ]
        print(json.dumps(rows, indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("kind", "name", "what it is", "from", box=None, pad_edge=False)
    for entry in entries:
        cells = (entry.component.kind, entry.component.name, entry.doc.summary, entry.origin)
        table.add_row(*map(escape, cells))
    console = make_console()
    console.print(table)
    if remarks := registry.remarks():
        console.print(escape(remarks), style="yellow")
